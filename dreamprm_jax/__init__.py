"""DreamPRM-1.5 in JAX: a process reward model whose training instances are weighted by exact meta-gradients."""
