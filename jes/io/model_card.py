"""What goes beside a fine-tuned model: a card, its curves, and the ledger it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = """\
---
{front}
---

# {title}

Fine-tuned from `{model}` on `{task}` with evolution strategies (ES) by jes {version}:
{generations} generations of {population} members, without backpropagation.

| held-out | before | after | examples |
|---|---|---|---|
{results}

![Reward, held-out results and distance from the base model](curves.png)

## Settings

Those that are not the defaults:

```json
{settings}
```

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

`vllm serve FOLDER` serves it.
"""
REBUILT = """
## Rebuild

`ledger.jsonl` and the base model are these weights: a fitness for each member of each
generation, from which the noise and every step follow.

    python -m jes.export --run=ledger.jsonl --out=FOLDER
"""


def beside_model(
    workdir: Path,
    config: Mapping[str, Any],
    changed: Mapping[str, Any],
    summary: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, bytes]:
    """Files by name: README.md, curves.png, and ledger.jsonl where there is one.

    Args:
      workdir: the run folder.
      config: all settings.
      changed: those that are not the defaults, by dotted name.
      summary: the contents of summary.json.
      versions: of the packages.
    """
    model = config["model"]
    front = ["library_name: transformers", "tags: [evolution-strategies, jes]"]
    if "/" in model and not Path(model).exists():
        front.insert(0, f"base_model: {model}")
    lines = []
    for name, one in summary["evaluations"].items():
        both = {"accuracy": one, "reward": one["reward"]}
        if one["before"] == one["reward"]["before"]:
            del both["reward"]
        for what, found in both.items():
            if found["before"] is not None and found["after"] is not None:
                pair = f"{found['before']:.4g} | {found['after']:.4g}"
                lines.append(f"| `{name}`, {what} | {pair} | {one['examples']} |")
    text = CARD.format(
        front="\n".join(front),
        title=f"{Path(model).name}, fine-tuned on {config['task']}",
        model=model,
        task=config["task"],
        version=versions["jes"],
        generations=summary["generations"],
        population=config["population"],
        results="\n".join(lines),
        settings=json.dumps(changed, indent=2),
    )
    files = {"curves.png": (workdir / "curves.png").read_bytes()}
    if (workdir / "ledger.jsonl").exists():
        files["ledger.jsonl"] = (workdir / "ledger.jsonl").read_bytes()
        text += REBUILT
    return files | {"README.md": text.encode()}
