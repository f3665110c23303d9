"""Random perturbations of a model, on WinoGrande (2602.00170, section 5 and App. G).

    python -m jes.studies.probe --config=configs/probe_winogrande.py:tiny
    python -m jes.studies.spectrum --config=configs/probe_winogrande.py:tiny

Four sizes of Qwen2.5 with the settings of the paper: 320 training prompts, 240
candidates a batch, σ from 1e-4 to 1e-2, greedy answers of at most 512 tokens. New
here are 320 fresh prompts and the sham, the model's own sampled answers (`:published`
is without them). Not run by us, but for `:tiny`, which is
`tiny/rules` on the embedded model; other sizes of it are made by
`python -m jes.pretrain --size=SIZE --out=FOLDER` and added with
`--config.models="('FOLDER', 'tiny')"`.
"""

from ml_collections import ConfigDict

from jes.studies import probe

VARIANTS = (None, "published", "tiny")


def get_config(variant: str | None = None) -> ConfigDict:
    """Settings of the probe."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}; there are {VARIANTS[1:]}")
    config = probe.default()
    config.task = "winogrande"
    config.models = tuple(
        f"Qwen/Qwen2.5-{size}B-Instruct" for size in ("0.5", "1.5", "3", "7")
    )
    config.dtype = "bfloat16"
    config.max_new_tokens = 512
    config.seed = 1234
    config.probe.sigmas = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    if variant == "published":
        config.probe.fresh = 0
        config.probe.sham_temperature = 0.0
    if variant == "tiny":
        config.models = ("tiny",)
        config.task = "tiny/rules"
        config.dtype = "float32"
        config.max_new_tokens = 0
        config.probe.sigmas = (1e-3, 3e-3, 1e-2, 3e-2)
        config.probe.candidates = 120
        config.probe.batches = 2
        config.curvature.sigmas = (3e-3, 1e-2, 2e-2)
        config.curvature.microbatch = 64
        config.curvature.top = 10
    return config
