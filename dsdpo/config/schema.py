"""Every option of a run, with its meaning in the docstring under it.

The docstrings are the one source for `dsdpo train --help` and for the table in the docs, so each says the
unit and what a special value means. Names are those of Hugging Face, TRL and LLaMA-Factory where one exists.
No torch here: reading a config must cost nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dsdpo.config.fields import CONSENT, FREE, Checked, OneOf, ResumePolicy, Switch, resume_policy
from dsdpo.config.hubs import ModelSource, picked_hub
from dsdpo.config.losses import ANY_LOSS, LOSSES, RANKINGS
from dsdpo.config.schedules import SCHEDULE_WORDS, check_schedule, read_kwargs, schedule_hint
from dsdpo.config.stages import STAGE_ALIASES, STAGES
from dsdpo.config.templates import DATE_WORDS, TEMPLATE_WORDS, check_date, check_template, template_hint
from dsdpo.config.times import TIME_WORDS, check_time, seconds_of, time_hint
from dsdpo.config.trackers import ALL, TRACKERS

LossType = Annotated[str, OneOf(lambda: [*LOSSES, *RANKINGS])]


def options_with(policy: ResumePolicy) -> list[str]:
    """Names of the options of a resume policy."""
    return [name for name, field in RunConfig.model_fields.items() if resume_policy(field) == policy]


Consentable = Annotated[str, OneOf(lambda: options_with("consent"))]

ROW_WORDS = "a whole number, at least 16, or auto"


def _check_row(value: int | str | None) -> int | str | None:
    if isinstance(value, int) and value < 16:
        raise ValueError(f"must be {ROW_WORDS}")
    return value


BITS_WORDS = "4 or 8"


def _check_bits(value: int | None) -> int | None:
    if value not in (None, 4, 8):
        raise ValueError(f"must be {BITS_WORDS}")
    return value


class RunConfig(BaseModel):
    """One run: model, data, objective, optimization and output."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, frozen=True)

    # --- model ---
    model_name_or_path: str = Field(json_schema_extra=FREE)
    """Model id on a hub, or a local folder with `config.json`, weights and tokenizer, or the output_dir of a run,
    whose weights are taken: those of its `final/`."""

    model_revision: str | None = Field(None, json_schema_extra=FREE)
    """Branch, tag or commit of model_name_or_path on its hub, for config, weights and tokenizer; a commit makes a run
    reproducible. Empty: the hub's default branch, as it is when the run starts."""

    hub: Literal["auto", "huggingface", "modelscope"] = Field("auto", json_schema_extra=FREE)
    """Hub that ids of models, data sets and templates are asked of. `modelscope` needs the `modelscope` extra. `auto`:
    Hugging Face, or ModelScope where USE_MODELSCOPE_HUB=1 is set and USE_HF is not."""

    stage: Annotated[str, OneOf(STAGES.keys)] = "dpo"
    """Training stage. `pt`: further pre-training on plain text, in chunks of at most max_length. `sft`: supervised
    training on the assistant's words. `dpo`: direct preference optimization on chosen/rejected pairs. `kto`: the same
    from single answers that are labelled good or bad. `rm` (or `rw`): a reward model on pairs, the language model with
    a head that gives a number for each answer."""

    finetuning_type: Literal["full", "lora"] = "lora"
    """`full` trains every parameter; `lora` trains low-rank adapters beside frozen weights."""

    quantization_bit: Annotated[int | None, Checked(_check_bits, BITS_WORDS)] = None
    """Bits of the frozen weights of linear layers under `lora` (QLoRA): each rank quantizes them with bitsandbytes as
    it loads a model of 16 or 32 bits. Embeddings, norms, output head and `score` stay as they are. Empty: not
    quantized."""

    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of 4 bits: `nf4`, quantiles of a normal distribution, or `fp4`, a floating point format."""

    double_quantization: bool = True
    """Quantize the scales of 4 bits too, one for 64 weights: 0.4 bits a weight less."""

    lora_rank: int = Field(8, ge=1)
    """Rank of the LoRA matrices."""

    lora_alpha: int | None = Field(None, ge=1)
    """LoRA scale numerator: updates are scaled by lora_alpha / lora_rank. Empty: 2 * lora_rank."""

    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the LoRA input, a probability; also that of an adapter in adapter_name_or_path."""

    adapter_name_or_path: str | None = Field(None, json_schema_extra=FREE)
    """Folder of a LoRA adapter to train further; it is then the reference too. Rank, scale and targets are its own,
    dropout is `lora_dropout`'s. What is more than LoRA matrices beside frozen weights is refused."""

    create_new_adapter: bool = False
    """Merge the adapter of the run that model_name_or_path or adapter_name_or_path names into its model, and begin from
    that: with a new adapter, or in full. The model is written once, into a folder `merged-…` of that run. False: that
    adapter is trained further."""

    lora_target: list[str] = ["all"]
    """Module names that get adapters, such as `q_proj,v_proj`. `all`, or `all-linear`: every linear layer but the
    output head."""

    attn_implementation: Literal[
        "auto", "sdpa", "varlen", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = Field("auto", json_schema_extra=FREE)
    """Attention over packed rows. `sdpa`: one torch SDPA call per segment, runs everywhere. `varlen`: one
    `torch.nn.attention.varlen` call. `flash_attention_2`, `_3`, `_4`: the packages flash-attn, flash-attn-3,
    flash-attn-4. These four need CUDA, bf16 or fp16, and GPUs of compute capability 8.0 (Ampere) or higher.
    `flex_attention`: torch's FlexAttention, CUDA. `auto`: varlen where it runs, else sdpa."""

    kernels: Literal["auto", "liger", "compile", "none"] = Field("auto", json_schema_extra=FREE)
    """Kernels of the decoder layers beside attention; they differ in rounding. `none`: transformers' own. `liger`:
    Liger's RMSNorm, SwiGLU or GeGLU and rotary positions, on CUDA, for the model types that it knows; needs the `cuda`
    extra. `compile`: each layer through torch.compile, which takes half a minute at the start; ZeRO stages 0 to 2.
    `auto`: liger where it runs, else none."""

    deterministic: bool = Field(False, json_schema_extra=FREE)
    """Let a run on GPUs repeat bit for bit: torch takes operations that add in a fixed order alone, and refuses to
    compute where there is none. Slower. On CPUs a run repeats anyway."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of weights and activations; gradients are summed, and the optimizer works, in fp32. `auto`: bf16 on
    CUDA, fp32 on CPU. `fp16`: for GPUs without bf16 (NVIDIA Turing and Volta). Its loss scale follows the block `fp16`
    of the DeepSpeed JSON, and a step whose gradients overflow is computed again with a lower one."""

    gradient_checkpointing: Annotated[Literal["auto", "none", "selective", "full"], Switch("full", "none")] = Field(
        "auto", json_schema_extra=FREE
    )
    """What of a decoder layer is computed again in the backward pass. `none`: nothing. `selective`: all but products
    with weight matrices and attention, for about half of the memory. `full` (or true): the whole layer, for about a
    third more time. `auto`: on CUDA the first of these with which a useful row fits the GPU; `none` on CPU."""

    disable_dropout: bool = True
    """Set every dropout of the model to 0, as TRL does. LoRA's own dropout stays as `lora_dropout` says."""

    # --- data ---
    dataset: list[str]
    """Names from dataset_info.json, paths inside dataset_dir, or hub ids; several are joined in this
    order."""

    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = "concat"
    """How several sets of `dataset` are mixed. `concat`: every example once an epoch. `interleave_under`,
    `interleave_over`: by `interleave_probs`, until the first set is used up, or the last one."""

    interleave_probs: list[float] | None = None
    """Share of each set of `dataset` in a mix, one number for each; they need not add up to 1. Empty: the same for
    all."""

    eval_dataset: list[str] = Field([], json_schema_extra=FREE)
    """Held-out sets, named like `dataset`."""

    val_size: float = Field(0.0, ge=0.0)
    """Held-out share of `dataset` when there is no eval_dataset: below 1 a fraction, from 1 on a number of
    pairs. 0: none."""

    val_split: Literal["prompt", "example"] = "prompt"
    """What val_size draws. `prompt`: prompts, each with all of its pairs, so that no held-out question was trained on;
    the number of pairs is as close to val_size as that allows. `example`: single pairs."""

    dataset_dir: str = Field("data", json_schema_extra=FREE)
    """Folder that holds dataset_info.json and the data files; a file outside it is refused."""

    ignore_columns: list[str] = Field([], json_schema_extra=FREE)
    """Columns of the data that are not read, in addition to those that an entry of dataset_info.json names.
    A column that looks like a part of the prompt or the reply, and that nothing reads, is an error unless
    it stands here."""

    template: Annotated[str, Checked(check_template, TEMPLATE_WORDS, template_hint)] = "default"
    """Chat template. `default`: the tokenizer's own. A name such as `chatml`, `llama3` or `gemma` (docs/formats.md has
    the list), the path of a .jinja file, or a model folder or id whose chat template is taken. `none` (or `gpt2`):
    prompt and completion as they stand."""

    template_date: Annotated[str | None, Checked(check_date, DATE_WORDS)] = Field(None, json_schema_extra=FREE)
    """Day that a template writes as today's, as YYYY-MM-DD, where it writes one. Empty: the day of the first prepare in
    cache_dir, which a run keeps in its checkpoints."""

    default_system: str | None = None
    """System message for conversations without one. Empty: what the template itself does."""

    mask_history: bool = False
    """Stage `sft`: train on the last reply of a dialogue alone, as in LLaMA-Factory. By default on all replies."""

    mask_thinking: bool = False
    """Leave the thoughts of replies (`<think>...</think>`, reasoning_content) out of the loss; they are still read.
    Stages `sft` and `dpo`."""

    neftune_noise_alpha: float | None = Field(None, gt=0.0)
    """Stage `sft`: uniform noise of this strength on the embeddings (NEFTune), such as 5. It is a function of seed,
    step and example: the same on any number of GPUs, and after a resume. Empty: none."""

    max_length: int = Field(1024, ge=8)
    """Longest prompt + completion, in tokens. What happens beyond it: `truncation_mode`."""

    truncation_mode: Literal["keep_start", "keep_end", "refuse"] = "keep_end"
    """Pairs over max_length. `keep_end`: drop the prompt's oldest tokens, so that answers stay whole and no pair is
    lost; where less than an eighth of max_length would be left to the prompt, the answers' ends are cut, too.
    `keep_start`: cut the answers' ends, as TRL does by default; pairs whose prompt alone reaches max_length are
    left out. `refuse`: leave the pair out. All are counted and reported."""

    max_samples: int | None = Field(None, ge=1)
    """Use only the first so many rows of each set. Empty: all."""

    max_refused: float = Field(0.01, ge=0.0, le=1.0, json_schema_extra=FREE)
    """Largest share of records that may be dropped before the run stops with exit code 65."""

    preprocessing_num_workers: int = Field(1, ge=1, json_schema_extra=FREE)
    """Processes that template and tokenize."""

    cache_dir: str | None = Field(None, json_schema_extra=FREE)
    """Folder for prepared data and reference log-probs, shared between runs. Empty: `.dsdpo_cache` beside
    output_dir."""

    # --- objective ---
    loss_type: list[LossType] = ["sigmoid"]
    """Losses to sum, under TRL's names. `sigmoid` is DPO, `sft` the negative log-likelihood per chosen token,
    `odpo` takes its margin from the data's scores; `simpo`, `cpo` and `orpo` need no reference. `plackett_luce`,
    `all_pairs` and `best_worst` take 2 to 16 ranked answers to a prompt, and stand alone. docs/losses.md has each with
    equation and paper."""

    loss_weights: list[float] | None = None
    """One weight per loss_type. Empty: 1 each."""

    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull to the reference model; a larger beta keeps the policy closer. `ipo`: tau. `simpo`: the
    scale of the reward, around 2. `orpo`: weight of the odds ratio."""

    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed probability that a pair is labelled the wrong way round: for `sigmoid` (conservative DPO), `robust`,
    `exo_pair` (above 0, such as 1e-3), `aot`, `aot_unpaired`, `odpo`, `simpo` and `cpo`."""

    ld_alpha: float | None = Field(None, ge=0.0, le=1.0)
    """Weight of the tokens beyond the length of the pair's shorter completion (LD-DPO). Empty: 1, plain sums."""

    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that holds the policy near the reference (f-DPO), for the losses on the difference of log-ratios."""

    f_alpha_divergence_coef: float = 0.5
    """Alpha of `alpha_divergence`."""

    use_weighting: bool = False
    """Weigh each pair by how likely the policy itself is to produce it (WPO). Not with `aot` and `aot_unpaired`."""

    discopop_tau: float = Field(0.05, gt=0.0)
    """Temperature of `discopop`'s mixing."""

    simpo_gamma: float = Field(0.5, ge=0.0)
    """Target reward margin of `simpo`."""

    cpo_alpha: float = Field(1.0, ge=0.0)
    """Weight of the log-likelihood term in `cpo`."""

    odpo_alpha: float = Field(1.0, ge=0.0)
    """Weight of `odpo`'s margin, the logarithm of the difference between chosen_score and rejected_score."""

    margin_from_scores: bool = False
    """Stage `rm`: the chosen answer is to be better by chosen_score - rejected_score of the data, which every pair must
    have (Llama 2)."""

    center_rewards_coefficient: float = Field(0.0, ge=0.0)
    """Stage `rm`: weight of the square of the sum of a pair's two rewards, which holds rewards around 0."""

    desirable_weight: float = Field(1.0, ge=0.0)
    """Stage `kto`: factor on the losses of good answers; with the other one, it balances unequal numbers."""

    undesirable_weight: float = Field(1.0, ge=0.0)
    """Stage `kto`: factor on the losses of bad answers."""

    reference: Literal["auto", "cached", "live", "none"] = Field("auto", json_schema_extra=FREE)
    """Where reference log-probs come from. `cached`: one pass of the untrained policy over the data, stored and
    reused while weights, token ids and settings stay the same. `live`: computed in every step, by the policy with its
    adapter switched off, or for full fine-tuning by a frozen copy sharded with ZeRO-3. `none`: for losses without a
    reference. `auto`: cached, or none where no loss needs one."""

    # --- batches ---
    train_batch_size: int = Field(32, ge=1)
    """Examples per optimizer step over all GPUs together, whatever their number: pairs, dialogues, labelled answers, or
    chunks of text."""

    max_tokens_per_row: Annotated[int | Literal["auto"] | None, Checked(_check_row, ROW_WORDS)] = Field(
        None, json_schema_extra=FREE
    )
    """Longest packed row, in tokens: what one GPU computes at a time. At least 2 * max_length, or max_length for stages
    of single answers and texts. It changes no result beyond rounding. Empty: on CUDA what the GPU's memory allows, by a
    formula that the first step corrects; 4 * max_length on CPU, and for examples of several answers. `auto`: the same
    on CUDA; 8192 on CPU, and no limit for examples."""

    share_prefix: bool = Field(True, json_schema_extra=FREE)
    """Compute a pair's prompt once for both completions. False: prompt+chosen and prompt+rejected as two
    sequences of a packed row."""

    # --- optimization ---
    num_train_epochs: float = Field(1.0, gt=0.0, json_schema_extra=CONSENT)
    """Passes over the data."""

    max_steps: int | None = Field(None, ge=1, json_schema_extra=CONSENT)
    """Optimizer steps; wins over num_train_epochs. Empty: by epochs."""

    learning_rate: float = Field(1e-5, gt=0.0, json_schema_extra=CONSENT)
    """Peak learning rate of AdamW. Empty: 1e-6 for `full`, as in TRL, and 1e-5 for `lora`, since adapters take about
    ten times the rate of full training (LoRA Without Regret, 2025)."""

    lr_scheduler_type: Annotated[str, Checked(check_schedule, SCHEDULE_WORDS, schedule_hint)] = Field(
        "cosine", json_schema_extra=CONSENT
    )
    """Learning rate after the warm-up, by transformers' names. `cosine`, `linear` fall to 0, `constant` (or
    `constant_with_warmup`) stays. `cosine_with_min_lr`, `cosine_warmup_with_min_lr` and `warmup_stable_decay` need
    lr_scheduler_kwargs; `cosine_with_restarts`, `polynomial` and `inverse_sqrt` take them. All are functions of the
    step: transformers' `reduce_lr_on_plateau` and `greedy` are not, and are refused."""

    lr_scheduler_kwargs: dict[str, Any] | None = Field(None, json_schema_extra=CONSENT)
    """Settings of lr_scheduler_type under transformers' names, such as `{min_lr_rate: 0.1}` for `cosine_with_min_lr` or
    `{num_decay_steps: 100}` for `warmup_stable_decay`. Empty: its defaults."""

    warmup_ratio: float = Field(0.0, ge=0.0, lt=1.0, json_schema_extra=CONSENT)
    """Share of all steps in which the learning rate rises from 0, linearly unless lr_scheduler_kwargs say more."""

    warmup_steps: int = Field(0, ge=0, json_schema_extra=CONSENT)
    """Warm-up in steps; wins over warmup_ratio when above 0."""

    weight_decay: float = Field(0.0, ge=0.0, json_schema_extra=CONSENT)
    """Decoupled weight decay on matrices; biases and norms have none."""

    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the first moment."""

    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    """AdamW's decay of the second moment."""

    adam_epsilon: float = Field(1e-8, gt=0.0)
    """AdamW's denominator offset."""

    max_grad_norm: float = Field(1.0, ge=0.0, json_schema_extra=CONSENT)
    """Gradients are scaled down to this global L2 norm. 0: no clipping."""

    seed: int = Field(42, ge=0, le=2**64 - 1)
    """Seed of data order, adapter initialization and dropout."""

    # --- running ---
    deepspeed: str | dict[str, Any] | None = Field(None, json_schema_extra=FREE)
    """DeepSpeed JSON: the name of one that comes with dsdpo (zero1, zero2, zero3, zero3_hpz, zero3_nvme,
    zero3_offload), a path, or the content as a mapping, on the command line as JSON. Empty: ZeRO stage 0, every GPU
    holds everything."""

    output_dir: str = Field(json_schema_extra=FREE)
    """Folder for this run's metrics, checkpoints, weights and plots. Where it holds a checkpoint of this run, training
    goes on from there."""

    logging_steps: int = Field(1, ge=1, json_schema_extra=FREE)
    """Steps between lines on the terminal and in the places of report_to; metrics.jsonl has every step."""

    save_steps: int | None = Field(500, ge=1, json_schema_extra=FREE)
    """Steps between checkpoints in output_dir/checkpoints; there is one after the last step too. Empty: none, but when
    the run is stopped."""

    save_total_limit: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Newest checkpoints that are kept; an older one is removed when a new one is complete. With 1 there is nothing to
    go back to where the newest is damaged. Empty: all."""

    save_every_forever: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Checkpoints after a multiple of so many steps are kept for ever, beyond save_total_limit. Empty: none."""

    async_save: bool = Field(False, json_schema_extra=FREE)
    """Write checkpoints beside the training. It stops only while the state is copied to the host's memory, which must
    hold 12 bytes for each trainable parameter, over all ranks."""

    resume_from_checkpoint: str | None = Field(None, json_schema_extra=FREE)
    """Checkpoint folder to go on from. Empty: the newest of output_dir that is whole, or the beginning."""

    change_on_resume: list[Consentable] = Field([], json_schema_extra=FREE)
    """Options whose new values count for a checkpoint that was saved with others; without it a difference is an
    error."""

    max_time: Annotated[str | None, Checked(check_time, TIME_WORDS, time_hint)] = Field(None, json_schema_extra=FREE)
    """Time after which the run saves a checkpoint and ends with exit code 75, such as `3h50m` or `90s`. Counted from
    its start. Empty: no limit."""

    hang_timeout: float = Field(120.0, gt=0.0, json_schema_extra=FREE)
    """Seconds without progress after which a run ends with exit code 71 and names the rank that is stuck. The first
    steps, a save and a batch of an evaluation may take half an hour. While a job is suspended, no time passes."""

    start_timeout: float = Field(45.0, gt=0.0, json_schema_extra=FREE)
    """Seconds that the ranks wait for each other at the start. Longer where nodes load Python slowly."""

    eval_steps: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Steps between evaluations on the held-out pairs. Empty: only at the end."""

    report_to: list[Annotated[str, OneOf(lambda: [*TRACKERS, ALL])]] = Field([], json_schema_extra=FREE)
    """Further places for the metrics, by transformers' names, each with its package: the `track` extra has the first
    three. `all`: those that are installed. Their project is `dsdpo`, or what WANDB_PROJECT, TRACKIO_PROJECT,
    MLFLOW_EXPERIMENT_NAME, SWANLAB_PROJECT, COMET_PROJECT_NAME or CLEARML_PROJECT says. One that fails does not end the
    run; a resumed run goes on in the same run there. Empty, or `none`: none."""

    run_name: str | None = Field(None, json_schema_extra=FREE)
    """Name of the run in the places of report_to. Empty: the name of output_dir."""

    push_to_hub: bool = Field(False, json_schema_extra=FREE)
    """Upload `final/` with its model card to the Hugging Face hub at the end, with the token of HF_TOKEN or `hf auth
    login`. A push that fails is exit code 74; the weights are in output_dir."""

    hub_model_id: str | None = Field(None, json_schema_extra=FREE)
    """Repository of push_to_hub, made where it is missing. Empty: the name of output_dir, in the token's account."""

    hub_private_repo: bool | None = Field(None, json_schema_extra=FREE)
    """Whether a repository that push_to_hub makes is private. Empty: as the account's settings say."""

    plot_loss: bool = Field(False, json_schema_extra=FREE)
    """Write loss.png and the other curves at the end."""

    disable_tqdm: bool = Field(False, json_schema_extra=FREE)
    """No progress bar: a line per logging_steps instead, as when the output is no terminal."""

    @model_validator(mode="before")
    @classmethod
    def _rate_of_finetuning_type(cls, values: Any) -> Any:
        """The default learning rate depends on what is trained."""
        if isinstance(values, dict) and values.get("learning_rate") is None:
            return {**values, "learning_rate": 1e-6 if values.get("finetuning_type") == "full" else 1e-5}
        return values

    @field_validator(
        *("lora_target", "dataset", "eval_dataset", "ignore_columns", "loss_type", "report_to", "change_on_resume"),
        mode="before",
    )
    @classmethod
    def _split_commas(cls, value: object) -> object:
        """Accept `a,b` for a list of names, as LLaMA-Factory's files and command lines write it."""
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("lr_scheduler_kwargs", mode="before")
    @classmethod
    def _json_text(cls, value: object) -> object:
        """Accept JSON text, and numbers that YAML takes for text."""
        return read_kwargs(value)

    @field_validator("stage", mode="before")
    @classmethod
    def _stage_by_another_name(cls, value: object) -> object:
        """Accept the names that other trainers have for a stage."""
        return STAGE_ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("lora_target")
    @classmethod
    def _words_of_peft(cls, value: list[str]) -> list[str]:
        """Accept PEFT's word for `all`, and the names that modules have inside its own model."""
        return ["all" if name == "all-linear" else name.removeprefix("base_model.model.") for name in value]

    @field_validator("loss_weights", "interleave_probs", mode="before")
    @classmethod
    def _one_weight(cls, value: object) -> object:
        """Accept a bare number for a list of one, and `1,0.5` from the command line."""
        if isinstance(value, str):
            return [part.strip() for part in value.split(",")]
        return [value] if isinstance(value, (int, float)) else value

    @property
    def model_source(self) -> ModelSource:
        """Where the run's model comes from."""
        return self.source_of(self.model_name_or_path)

    def source_of(self, name: str) -> ModelSource:
        """Where a model comes from that is named in this run: `model_revision` is of the run's own."""
        revision = self.model_revision if name == self.model_name_or_path else None
        return ModelSource(name, picked_hub(self.hub), revision)

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else seconds_of(self.max_time)

    @property
    def row_tokens(self) -> int | None:
        """`max_tokens_per_row`, or its default on a CPU, by which examples are dropped as too long everywhere; None for
        `auto`."""
        return None if self.max_tokens_per_row == "auto" else self.max_tokens_per_row or 4 * self.max_length

    @property
    def reference_kind(self) -> Literal["cached", "live", "none"]:
        """`reference`, with `auto` decided."""
        if "reference" not in STAGES[self.stage].options:
            return "none"
        if self.reference != "auto":
            return self.reference
        if self.stage == "kto":
            return "cached"
        return "cached" if any(ANY_LOSS[loss].reference for loss in self.loss_type) else "none"

    @property
    def cache_path(self) -> Path:
        """`cache_dir`, or its default."""
        return Path(self.cache_dir) if self.cache_dir else Path(self.output_dir).parent / ".dsdpo_cache"

    @property
    def weight_stamps(self) -> Path:
        """Folder that remembers hashes of weight files."""
        return self.cache_path / "reference" / "weights"

    @property
    def weighted_losses(self) -> dict[str, float]:
        """loss_type -> weight."""
        return dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type)))
