"""Every setting of a run, with its default; a file in `configs/` changes some."""

from ml_collections import ConfigDict

DTYPES = ("float32", "bfloat16", "float16")
"""Of the weights that answer. The master, which is trained, is float32."""


def default() -> ConfigDict:
    """The settings of `jes.train`."""
    config = ConfigDict()

    # What is trained, on what.
    config.seed = 0
    config.method = "es"  # or a baseline: 'grpo', 'sft'
    config.model = "tiny"  # a folder, a hub id; 'tiny' or 'tiny-knowing' (embedded)
    config.quantize = ""  # 'int4', 'int8' or 'w8a8' rounds a float model first
    config.group_size = 128  # of int4 and int8: weights that share a scale
    config.dtype = "float32"  # of the weights that answer; the master is float32
    config.task = "tiny/min"
    config.mode = "generate"  # or 'likelihood', where the task has choices
    config.data = ConfigDict()
    config.data.root = ""  # folder of parquet files in hub layout; '' is the hub
    config.data.train = 0  # how many training examples to use; 0 for all
    config.data.test = 0  # how many held-out examples to evaluate on; 0 for all

    # Evolution (2509.24372).
    config.generations = 100
    config.population = 30
    config.sigma = 0.001
    config.alpha = 0.0005
    config.alpha_half_life = (
        0  # generations after which α is halved, each time; 0 never
    )
    config.sigma_half_life = 0  # the same of σ
    config.antithetic = False
    config.noise = "normal"  # or 'table', about normal and faster on CPUs
    config.draw = "member"  # or 'layer': again for each layer and pass, in less memory
    config.rank = 0  # of the noise of a matrix (2511.16652), such as 1; 0 for full rank
    config.shaping = "zscore"  # or 'centered_rank', 'pair_zscore', 'none'

    config.objective = "reward"  # or of `OBJECTIVES`, for ESMA (2602.02605)
    config.shuffle_fitness = False  # a control: steps as long, in random directions

    # Anchored weight decay (2605.30148): a pull back to the base model.
    config.decay = "none"  # or 'l2', 'l1'
    config.decay_coefficient = 0.0  # λ; L2 takes off the share alpha x λ a generation
    config.anchor = "device"  # 'bfloat16', rounded; 'host', out of its memory; 'none'

    # Quantised weights (2602.03120): how steps come to whole codes. 'replay' computes
    # the residual again from the last `window` generations, 'residual' keeps it,
    # 'naive' drops it, 'quzo' rounds at random; 'none' is for a model of floats. Then
    # sigma is in codes, and alpha is that of Eq. 6, divided by sigma.
    config.rounding = "none"
    config.residual_decay = 0.9  # γ
    config.window = 50  # K
    config.residual_dtype = "float32"  # of 'residual'; or 'bfloat16', 'float16'
    config.initial_residual = "zero"  # or 'uniform', as in the published code
    config.residual_clip = 0.0  # 0 for none; 1.5 in the published code
    config.divide_by_population = True  # the 1/N of Eq. 5, not in the published code
    config.scale_sigma = 0.0  # of the scales, in units of these; 0 keeps them frozen
    config.scale_alpha = 0.0

    # The policy gradient that ES is compared with; `population` is its group.
    config.grpo = ConfigDict()
    config.grpo.learning_rate = 1e-6
    config.grpo.clip = 0.2
    config.grpo.kl = 0.001
    config.grpo.minibatch = 0  # answers of one optimizer step; 0 for all
    config.grpo.epochs = 1

    # Supervised fine-tuning of what the model says that it knows, a baseline of ESMA
    # (2602.02605); a generation is an optimizer step, on `prompts` questions.
    config.sft = ConfigDict()
    config.sft.learning_rate = 2e-5
    config.sft.loss = "answer"  # or 'all', on the question's tokens too, as published

    # One generation's questions and answers.
    config.prompts = 0  # prompts a generation, drawn anew each time; 0 for all
    config.max_new_tokens = 0  # 0 for the task's own
    config.temperature = 0.0
    config.top_k = 0
    config.top_p = 1.0
    config.buckets = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)

    # Members held in memory at once, on each device; 0 chooses from the memory.
    config.chunk = 0
    config.memory_gb = 0.0  # 0 for what is free

    # Prompts that a member answers at a time: an answer that ends leaves its place to
    # the next. 0 chooses: all prompts, or fewer where answers may be long or the
    # memory is too small; as many as there are prompts is all of them.
    config.slots = 0
    config.slice_tokens = 32  # most tokens until the host sees to free slots

    # Devices of a process; a model is spread over `model_parallel` of them, and the
    # members over the rest.
    config.devices = 0  # 0 for all
    config.model_parallel = 1
    # Devices that each hold a whole model of floats move a part of it and send it
    # round, instead of drawing all noise each. Hosts still send scores alone.
    config.share_update = False

    # Evaluation on held-out examples, before, every so many generations, and after.
    config.eval_every = 50
    config.eval_train = False  # on the training examples too
    config.eval_tasks = ()  # beside the task itself, such as prior tasks
    config.eval_batch = 256
    config.kl_prompts = 0  # of each evaluated task, for the KL to the base model
    config.kl_max_new_tokens = 256
    config.checkpoint_every = 25
    return config
