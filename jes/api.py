"""From Python: a run in one call, through the same code as the command line.

result = jes.fine_tune("tiny", reward=reward, data="rows.jsonl", generations=50)
"""

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import ml_collections

from jes.config import Settings, default
from jes.errors import InputError
from jes.evaluate import load_model
from jes.io.console import console
from jes.io.interrupts import Stopped
from jes.io.metrics import read_rows
from jes.models.weights import Pretrained, load
from jes.sampling.generate import generate
from jes.sampling.prompts import encode
from jes.scoring import decoded
from jes.tasks import Data, Given, Prompt
from jes.tasks.own import IN_PYTHON
from jes.train import run

Rows = str | Path | Iterable[Mapping[str, Any]]
DATA = {field.name for field in dataclasses.fields(Data)} - {"train", "test"}


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a run has come to.

    Attributes:
      workdir: the run folder.
      pretrained: the fine-tuned model.
      history: the rows of `metrics.jsonl`, one a generation.
      evaluations: the rows of `evaluations.jsonl`.
      answers: the rows of `answers.jsonl`: the same held-out prompts each time.
      finished: whether the run came to its end.
    """

    workdir: Path
    pretrained: Pretrained
    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    finished: bool

    def __repr__(self) -> str:
        done, last = len(self.history), self.evaluations[-1:]
        reward = f", held-out reward {last[0]['reward']:.3g}" if last else ""
        return f"Result({done} generations{reward}, {self.workdir})"

    def sample(self, prompts: Sequence[Prompt], **options: Any) -> list[str]:
        """What the fine-tuned model answers; see `answer`."""
        return answer(self.pretrained, prompts, **options)

    def save(self, folder: str | Path, **options: Any) -> None:
        """Writes the model as a Hugging Face folder; see `Pretrained.save`."""
        self.pretrained.save(folder, **options)


def fine_tune(
    model: str = "tiny",
    reward: Any = None,
    data: Rows | None = None,
    *,
    task: Any = None,
    test: Rows | None = None,
    workdir: str | Path | None = None,
    on_generation: Callable[[dict[str, Any]], Any] | None = None,
    **settings: Any,
) -> Result:
    """Fine-tunes a model by evolution strategies.

    Args:
      model: a folder, a hub id, or 'tiny' for the embedded model.
      reward: a function (see `jes.tasks.rewards` for its forms) or several.
      data: rows to train on, or where they are, see `jes.tasks.Data`.
      task: in place of a reward: a `jes.Task`, which has its data, or a name as in
        `config.task`.
      test: held-out rows; without, a share of `data` (`holdout`) is held out.
      workdir: the run folder, where the same call goes on; None for a temporary one.
      on_generation: called with each row of `metrics.jsonl`; True ends the run.
      settings: any of `jes.config.Settings`, and of `jes.tasks.Data`.

    Returns:
      The result; also of a run that was interrupted (Ctrl-C, a stopped cell).

    Raises:
      InputError: if a setting, the model, the data or the reward cannot work.
    """
    config = configured(settings)
    config.model = str(model)
    if (reward is None) == (task is None):
        raise InputError("give a reward and its data, or a task")
    train, config.data.train = _rows(data)
    held_out, config.data.test = _rows(test)
    if isinstance(task, str):
        config.task = task
        given = Given(None, train, held_out) if train or held_out else None
    else:
        what = task if reward is None else reward
        config.task = IN_PYTHON + getattr(what, "name", getattr(what, "__name__", ""))
        given = Given(what, train, held_out)
    folder = Path(workdir or tempfile.mkdtemp(prefix="jes-"))
    finished, result = True, None
    try:
        try:
            run(config, folder, given, on_generation)
        except Stopped:
            finished = False
            console.print("interrupted: the result is what there is")
        result = _result(folder, finished)
    finally:
        if workdir is None and result is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif workdir is None:  # it goes with the result
            weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def configured(settings: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The default config with these settings.

    Raises:
      InputError: for a name that is none, or a value of another type.
    """
    config = default()
    for name, value in settings.items():
        group = config.data if name in DATA else config
        if name not in group:
            known = [*(field.name for field in dataclasses.fields(Settings)), *DATA]
            close = get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise InputError(f"there is no setting {name!r}{hint}")
        try:
            if name == "sigma" and value == "auto":
                value = 0.0
            if isinstance(value, Mapping):
                group[name].update(value)
            else:
                group[name] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{name}={value!r}: {error}") from error
    return config


def _rows(given: Rows | None) -> tuple[list[Mapping[str, Any]] | None, str]:
    """Rows that are given, or the name of where they are."""
    if given is None or isinstance(given, str | Path):
        return None, str(given or "")
    return list(given), ""


def _result(workdir: Path, finished: bool) -> Result:
    """What is in a run folder."""
    if (workdir / "summary.json").exists():
        pretrained = load(workdir / "model")
    elif (workdir / "config.json").exists():
        pretrained, _ = load_model(str(workdir))
    else:
        raise InputError("the run was interrupted before it had begun")
    history, evaluations, answers = (
        read_rows(workdir / f"{name}.jsonl")
        for name in ("metrics", "evaluations", "answers")
    )
    return Result(workdir, pretrained, history, evaluations, answers, finished)


def answer(
    pretrained: Pretrained,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 256,
    *,
    system: str = "",
    **options: Any,
) -> list[str]:
    """Text in, text out.

    Args:
      pretrained: from `load`.
      prompts: text, which becomes a chat message where the model has a chat template;
        or chat messages.
      max_new_tokens: longest answer, in tokens.
      system: a system message before text.
      options: of `jes.generate`, such as `temperature` and `key`.

    Raises:
      InputError: if the model has no tokenizer, or no template for messages.
    """
    tokenizer = pretrained.tokenizer
    if tokenizer is None:
        raise InputError("the model folder has no tokenizer, which text needs")
    chat = tokenizer.chat_template is not None
    if system and not chat:
        raise InputError(
            "this model has no chat template, which a system message needs"
        )
    head = [{"role": "system", "content": system}] if system else []
    asked: list[Prompt] = []
    for one in prompts:
        if isinstance(one, str) and chat:
            asked.append([*head, {"role": "user", "content": one}])
        else:
            asked.append(one)
    if options.get("temperature"):
        options.setdefault("key", jax.random.key(0))
    tokens = generate(
        pretrained.model,
        pretrained.params,
        [encode(tokenizer, one) for one in asked],
        max_new_tokens,
        eos_ids=pretrained.eos_ids,
        **options,
    )
    return decoded(tokenizer, tokens)
