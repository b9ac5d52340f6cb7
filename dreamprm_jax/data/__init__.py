"""From files to padded batches. numpy and PIL only: Grain's workers import this, and no jax."""
