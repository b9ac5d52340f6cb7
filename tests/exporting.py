"""What the tests of exports share: a tiny checkpoint, and the config of an export."""

import jax
import pytest

from configs import export
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.data.tokens import wrap
from dreamprm_jax.models import convert, internvl, presets


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A fresh tiny model in the original layout, with the embedded benchmark's tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = wrap(noisy_steps.tokenizer())
    config = presets.tiny(tokenizer.vocab_size)
    params = jax.jit(internvl.init, static_argnums=0)(config, jax.random.key(0, impl="rbg"))
    convert.save_checkpoint(config, params, directory)
    (directory / "tokenizer.json").write_text(tokenizer.tokenizer.to_str())
    return directory


def export_config(checkpoint, **options):
    cfg = export.get_config()
    cfg.model.checkpoint = str(checkpoint)
    cfg.export.update(options)
    return cfg
