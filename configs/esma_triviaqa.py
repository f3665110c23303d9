"""Knowing what it knows, learned on TriviaQA: ESMA, as in 2602.02605.

    python -m jes.train --config=configs/esma_triviaqa.py [--config.data.root=FOLDER]
    python -m jes.train --config=configs/esma_triviaqa.py:1.5b
    python -m jes.train --config=configs/esma_triviaqa.py:tiny

Each question is asked twice, for the answer and whether the model knows it, and a
member's fitness is accuracy plus the share of questions where the two agree. The first
is Qwen2.5-0.5B-Instruct, the default of the published code; `:1.5b`, `:3b` and `:7b`
are the larger models. Population, sigma, alpha, questions a generation and tokens are
the code's; 750 generations are those of its figures (the code's default is 300).
Different here: answers are greedy, the question about knowing goes through the chat
template, and training is in float32 (members answer in bfloat16).

`:published` follows the code there: the second question is raw text, and members sample
at temperature 0.7 from the top 20 tokens within 0.8, as the generation settings of
Qwen2.5-Instruct have it, which the code seems not to override (we have no penalty for
repetition, which they have too). Its z-scores divide by the standard deviation with
N - 1, which is a smaller alpha, by the root of (N - 1) / N. What is reported is of
greedy answers, here too.

Published for the 1.5B model on the validation split of TriviaQA, after 750 generations:
d' of the generated answers from 0.1985 to 0.9302, answers and knowing agree on 53.30 ->
68.86 % of the questions. Both are read from figures in the history of the code's
repository, one run; that they are of generated answers is inferred from file names.
Here 1000 questions are evaluated on (all by `--config.data.test_examples=0`), besides
two data sets that are not trained on and one prompt that lets the model answer "I don't
know".

Not run by us: 750 generations are 12.3 million answers of up to 32 tokens. Somebody
reports 13 hours on four A100 for the 3B model. Needs an accelerator, and from the hub
or as parquet in FOLDER `google-research-datasets/nq_open`, `stanfordnlp/web_questions`
and `mandarjoshi/trivia_qa`: 138 thousand rows to train on, which take two minutes to
encode (`--config.data.train_examples=20000` takes fewer).
`:tiny` is the second embedded model on `tiny/knows`, `:tiny_int4` the same rounded to
int4 codes, with seed replay (2602.03120).
"""

import math

from ml_collections import ConfigDict

from jes.config import default

SIZES = {None: "0.5B", "1.5b": "1.5B", "3b": "3B", "7b": "7B", "published": "0.5B"}


def get_config(variant: str | None = None) -> ConfigDict:
    """Settings of the run; `variant` is what follows the colon."""
    if variant in ("tiny", "tiny_int4"):
        return tiny(codes=variant == "tiny_int4")
    if variant not in SIZES:
        there = ", ".join(name for name in (*SIZES, "tiny", "tiny_int4") if name)
        raise ValueError(f"there is no variant {variant!r}; there are {there}")
    config = default()
    config.task = "trivia_qa"
    config.objective = "esma"
    config.model = f"Qwen/Qwen2.5-{SIZES[variant]}-Instruct"
    config.dtype = "bfloat16"
    config.population = 32
    config.sigma = 0.001
    config.alpha = 0.0005
    config.prompts = 256
    config.max_new_tokens = 32
    config.generations = 750
    config.eval_tasks = ("nq_open", "web_questions", "trivia_qa/idk")
    config.eval_every = 50
    config.data.test_examples = 1000
    if variant == "published":
        config.task = "trivia_qa/published"
        config.eval_tasks = (
            "nq_open/published",
            "web_questions/published",
            "trivia_qa/idk",
        )
        config.temperature = 0.7
        config.top_k = 20
        config.top_p = 0.8
        config.alpha *= math.sqrt((config.population - 1) / config.population)
    return config


def tiny(codes: bool) -> ConfigDict:
    """The second embedded model, in minutes on two CPU cores."""
    config = default()
    config.model = "tiny-knowing"
    config.task = "tiny/knows"
    config.objective = "esma"
    config.population = 64
    config.prompts = 64
    config.sigma = 0.01
    config.alpha = 0.01
    config.generations = 40
    config.eval_tasks = ("tiny/knows_chat", "tiny/knows_other")
    config.eval_every = 10
    if codes:
        # Perturbations as long as in floats (studies/paper_configs.py), and steps twice
        # as long: with the same, hardly a code moves.
        config.quantize = "int4"
        config.group_size = 32
        config.rounding = "replay"
        config.sigma = 0.26
        config.alpha = 0.52
    return config
