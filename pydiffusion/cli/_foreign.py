"""Flags and verbs of llama.cpp, Ollama and vLLM: ours where the meaning is the same, else a hint.

One table each. A flag is rewritten to ours, dropped with a note where it can't change a result, or refused
with the reason; nothing is dropped in silence. Names that users of those programs type most (-c, -t, -ngl,
-s, -f) are declared with the options themselves.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ours:
    """Rewritten to this option of ours, or, if empty, to an argument before all others."""

    name: str = ""
    prefix: str = ""  # put before the value


@dataclass(frozen=True)
class NoEffect:
    """Dropped with a note. values: what may follow as its value; None for any one word, empty for none."""

    why: str
    values: Collection[str] | None = ()


@dataclass(frozen=True)
class Refused:
    """A usage error with this hint. has_value: whether a value follows, to go on after it."""

    hint: str
    has_value: bool = True


@dataclass(frozen=True)
class Scaled:
    """Rewritten to this option of ours, whose values are PATH:SCALE: after a path, a number of its own or
    behind a colon; several with commas between them.
    """

    name: str


Meaning = Ours | NoEffect | Refused | Scaled

_WORD = re.compile("-[A-Za-z][A-Za-z-]+")
_NUMBER = re.compile(r"[+-]?\d*\.?\d+")
_ON_OFF = ("on", "off", "auto", "0", "1", "true", "false")
_SAMPLING = Refused(
    "a diffusion sampler draws whole canvases: leave it out; it has --steps, --t-max, --entropy-bound"
)
_ONE_CACHE = Refused("K and V have one type here: --cache-type f16, f32 or q8_0")
_ROPE = Refused("positions are as the file says; --ctx goes up to the model's own context length")
_MERGE = "pydiffusion convert IN OUT --lora PATH[:SCALE] merges an adapter (docs/adapters.md)"
_NO_DRAFT = Refused("speculative decoding is for autoregressive models; leave it out")
_FIXED = NoEffect("sizes of batches are chosen by the runtime", None)
_MAPPED = NoEffect("the file is always mapped")
_CONVERSATION = Refused("for a conversation: pydiffusion chat -m MODEL", has_value=False)

_FLAGS: dict[str, Meaning] = {
    # Where the meaning is the same
    "--ctx-size --n-ctx --num-ctx --context-size --max-model-len --max-seq-len": Ours("--ctx"),
    "--n-predict --predict --num-predict --max-new-tokens --n-tokens": Ours("--max-tokens"),
    "--n-gpu-layers --num-gpu --ngl": Ours("--gpu-layers"),
    "--n-threads --num-thread": Ours("--threads"),
    "--model-path": Ours("--model"),
    "--system-prompt": Ours("--system"),
    "--json-schema-file -jf": Ours("--json-schema"),
    "--override-tensor-type": Ours("--tensor-type"),
    "-ncmoe --cpu-moe-layers": Ours("--n-cpu-moe"),
    "-dev": Ours("--device"),
    "-r --reverse-prompt": Ours("--stop"),
    "-np --max-num-seqs": Ours("--parallel"),
    "-hf -hfr --hf-repo": Ours("--model", prefix="hf.co/"),
    "--reasoning-budget": Ours("--thinking-budget"),
    "--api-key-env": Refused("set the key as PYDIFFUSION_API_KEY"),
    "--chat-template-file": Ours("--chat-template"),
    "-no-cnv --no-conversation": Ours("--raw"),
    "--diffusion-steps": Ours("--steps"),
    "-sysf --system-prompt-file": Refused('the text itself: --system "$(cat FILE)"'),
    "--yes": NoEffect("nothing is asked"),
    # Without effect on a result
    "-fa --flash-attn": NoEffect("attention never materializes its scores", _ON_OFF),
    "-b --batch-size --num-batch -ub --ubatch-size": _FIXED,
    "-tb --threads-batch": NoEffect("prefill and denoising use the same threads: -t", None),
    "--no-mmap --mmap": _MAPPED,
    "-fit --fit": NoEffect("what does not fit on a GPU stays on the CPU by itself", _ON_OFF),
    "--mlock": NoEffect("pages are not locked; a memory limit of the system does that"),
    "--color -co": NoEffect("a terminal gets colours by itself, unless NO_COLOR is set", _ON_OFF),
    "--no-warmup --warmup": NoEffect("the first request is as fast as later ones"),
    "-kvu --kv-unified -nkvo --no-kv-offload --no-kv-unified": NoEffect("the runtime places the cache"),
    "--no-display-prompt": NoEffect("the prompt is never repeated"),
    "--no-context-shift --no-perf --simple-io": NoEffect("it is always so here"),
    "--multiline-input -mli": NoEffect("a pasted text is one message, as are lines between two of \"\"\""),
    "-st --single-turn": NoEffect("one answer is all that is generated"),
    "-v --verbose --log-verbose": NoEffect("speed and steps are always printed"),
    "--log-disable --log-colors --log-prefix --log-timestamps": NoEffect(
        "nothing is logged but a line for loading and one for the answer; generate --quiet drops these"
    ),
    "-sp --special-tokens": Refused("control tokens are never printed", has_value=False),
    "--log-file": NoEffect("redirect stderr instead: 2>FILE", None),
    "--jinja": NoEffect("chat templates always run as Jinja"),
    "--keep --keepalive --keep-alive": NoEffect("a model stays loaded as long as its process", None),
    "--cont-batching -cb": NoEffect("requests are always batched continuously"),
    "--verbose-prompt": NoEffect("the number of the prompt's tokens is always printed"),
    "--threads-http": NoEffect("requests need no threads of their own", None),
    "--nowordwrap": NoEffect("the terminal wraps lines"),
    "--numa --prio --poll --cpu-mask -C --prio-batch": NoEffect("the system's taskset, nice, numactl", None),
    "--mmproj-auto": NoEffect("a vision file beside the model is found by itself"),
    "--mmproj-offload --no-mmproj-offload": NoEffect("the vision file is on the model's device"),
    "--limit-mm-per-prompt": NoEffect("a request may have 32 images", None),
    # Without counterpart
    "-temp": Ours("--temp"),
    "--top-k --top-p --min-p --typical --typical-p --top-nsigma --xtc-probability --xtc-threshold": _SAMPLING,
    "--repeat-penalty --repeat-last-n --presence-penalty --frequency-penalty": Refused(
        "penalties need token by token generation; --stop-on-repetition ends a text that repeats itself"
    ),
    "--mirostat --mirostat-lr --mirostat-ent --samplers --sampling-seq --dry-multiplier": _SAMPLING,
    "-l --logit-bias": _SAMPLING,
    "--ignore-eos": Refused("a text ends at its eos; in Python GenerationOptions(eos=...)", has_value=False),
    "-ctk --cache-type-k -ctv --cache-type-v --kv-cache-dtype": _ONE_CACHE,
    "--rope-scaling --rope-freq-base --rope-freq-scale --yarn-ext-factor --rope-scale": _ROPE,
    "--lora-scaled": Scaled("--lora"),
    "--lora-base": Refused("an adapter applies to the model of -m, whatever its type: leave it out"),
    "--adapter-path --lora-path --adapter": Ours("--lora"),
    "--enable-lora": NoEffect("--lora loads adapters"),
    "--max-loras --max-lora-rank --max-cpu-loras --lora-dtype": NoEffect("any rank and number", None),
    "--lora-modules": Refused("--lora PATH; requests name an adapter by its own name, or by its number"),
    "--control-vector --control-vector-scaled": Refused("control vectors are not supported"),
    "--mmproj": Ours("--mmproj"),
    "--image": Ours("--image"),
    "--audio": Refused("audio is not read"),
    "--no-mmproj": Refused("without a vision file: --mmproj none", has_value=False),
    "-mmu --mmproj-url": Refused("download it first, and --mmproj FILE"),
    "--image-min-tokens --image-max-tokens": Refused(
        'messages say how many tokens an image takes: "detail", or "max_soft_tokens" (docs/vision.md)'
    ),
    "--allowed-local-media-path --media-path": Refused("clients send their images; no files here are read"),
    "--allowed-media-domains": Refused("--allow-image-urls fetches from any public address"),
    "-md --model-draft --draft --draft-max --speculative-config": _NO_DRAFT,
    "-hff --hf-file": Refused("the file follows the repo: -m OWNER/NAME:FILE.gguf"),
    "-hft --hf-token": Refused("set the token as HF_TOKEN, or log in with `hf auth login`"),
    "-mu --model-url": Refused("download it first, or -m OWNER/NAME:FILE.gguf from the Hugging Face Hub"),
    "-ts --tensor-split -mg --main-gpu -sm --split-mode": Refused(
        "layers are split by the GPUs' free memory: --device CUDA0,CUDA1, --gpu-memory 8GiB,24GiB"
    ),
    "-ot --override-tensor -cmoe --cpu-moe": Refused("experts on the CPU: --n-cpu-moe LAYERS"),
    "--tensor-parallel-size -tp": Refused("layers are split over the GPUs by themselves; see --device"),
    "--gpu-memory-utilization": Refused("the maximum as a size: --gpu-memory 20GiB"),
    "--grammar-lazy --grammar-triggers": Refused("tool calls are constrained by tool_choice on the server"),
    "--format": Refused("an answer as JSON: --json-schema FILE; the command's own result as JSON: --json"),
    "--think --reasoning --reasoning-format": Refused(
        "thinking is the chat template's choice; --thinking-budget N limits it"
    ),
    "--prompt-cache --prompt-cache-all --slot-save-path": Refused(
        "from Python: Session.save(path), model.load_session(path)"
    ),
    "-bf --binary-file": Refused("the prompt is text: -f FILE"),
    "-e --escape": Refused("escapes are the shell's: $'line one\\nline two'", has_value=False),
    "--in-prefix --in-suffix --in-prefix-bos": Refused("a chat template does that: --chat-template FILE"),
    "--prompt-file": Ours("--file"),
    "--context-shift": Refused("a text ends where the context ends: give a larger --ctx", has_value=False),
    "--list-devices": Refused("pydiffusion devices lists them", has_value=False),
    "--ssl-key-file --ssl-cert-file": Refused("put a proxy with TLS in front"),
    "--logprobs": Refused("log probabilities are not available; from Python Session.denoise gives logits"),
    "--embedding --embeddings --pooling --rerank --reranking": Refused(
        "embeddings are not available", has_value=False
    ),
}  # fmt: skip
# What a flag means for one command only.
_OF_COMMAND: dict[str, dict[str, Meaning]] = {
    "run": {
        "-i --interactive --interactive-first -cnv --conversation -ins --instruct": NoEffect(
            "without a prompt it is a conversation"
        ),
        "--raw -no-cnv --no-conversation": Refused(
            "a raw prompt: pydiffusion generate --raw -p TEXT", has_value=False
        ),
    },
    "generate": {
        "-i --interactive --interactive-first -cnv --conversation -ins --instruct": _CONVERSATION,
    },
    "chat": {
        "-i --interactive --interactive-first -cnv --conversation -ins --instruct": NoEffect(
            "it is a conversation"
        ),
        "-p --prompt": Refused("chat asks for messages; pydiffusion generate takes a prompt"),
        "-st --single-turn": Refused("one answer: pydiffusion generate -p TEXT", has_value=False),
        "--raw -no-cnv": Refused("a raw prompt: pydiffusion generate --raw -p TEXT", has_value=False),
    },
    "serve": {
        "-a --alias --served-model-name": Refused("the server answers to the model's own name"),
        "-to": Ours("--timeout"),
        "-p --prompt": Refused("requests bring their prompts; for one here: pydiffusion generate -p TEXT"),
        "-n --max-tokens": Refused("requests set max_tokens"),
        "--temp -s --seed": Refused("requests set it"),
        "--no-webui --no-ui": Refused("the chat page is always there; --host 127.0.0.1 keeps it here", False),
        "--reasoning-format": NoEffect("thinking is apart, as reasoning_content", None),
        "--think --reasoning --reasoning-budget --thinking-budget": Refused(
            "requests set enable_thinking and thinking_budget"
        ),
        "--metrics --slots --props": NoEffect("/metrics is always there"),
    },
    "quantize": {
        "--output --outfile -o": Refused("the file to write is the second argument: quantize IN OUT TYPE"),
        "--allow-requantize": NoEffect("it is permitted, with a note"),
        "--pure --leave-output-tensor": Refused(
            "types by tensor: --tensor-type PATTERN=TYPE", has_value=False
        ),
        "--output-tensor-type": Refused("--tensor-type '^output.weight$=TYPE'"),
        "--token-embedding-type": Refused("--tensor-type '^token_embd.weight$=TYPE'"),
        "--keep-split": Refused("the size of the parts: --split-max-size 5G", has_value=False),
    },
    "convert": {
        "--model-name --model": Refused("the folder, or OWNER/NAME, is the first argument"),
        "--vocab-only": Refused("a file is written whole", has_value=False),
        "--use-temp-file --no-lazy": NoEffect("weights are read piece by piece"),
        "--remote": NoEffect("OWNER/NAME is fetched, or read from the cache"),
        "--bigendian": Refused("files are little-endian", has_value=False),
        "--split-max-tensors": Refused("parts are cut by size: --split-max-size 5G"),
    },
    "bench": {
        "-p --n-prompt": Ours("--prompt"),
        "-r --repetitions": Ours("--steps"),
        "-n --n-gen": Refused("--steps N denoising steps are timed, not tokens"),
        "-o --output": Refused("--json prints the report as JSON"),
    },
    "imatrix": {
        "-f --file --in-file": Refused("the text is the second argument: imatrix MODEL TEXT -o FILE"),
        "-c --ctx-size --chunk-size": Ours("--chunk"),
        "--chunks": Ours("--max-chunks"),
    },
    "split": {
        "--split": NoEffect("it is what this does"),
        "--split-max-tensors": Refused("parts are cut by size: --split-max-size 5G"),
        "--merge": Refused("to merge: pydiffusion merge IN OUT", has_value=False),
    },
    "merge": {"--merge": NoEffect("it is what this does")},
    "devices": {"--list-devices": NoEffect("it is what this does")},
}
# Commands without arguments: one is the model. Commands whose first argument is the model, which -m names.
_MODEL_AS_OPTION = ("serve", "devices", "bench")
_MODEL_FIRST = ("inspect", "doctor", "verify", "imatrix", "quantize")

_NO_PERPLEXITY = "a diffusion model has no perplexity; pydiffusion evaluate measures quantization's loss"
#: Verbs of other programs: the name of a command of ours, or a hint.
VERBS: dict[str, str] = {
    "ls": "list",
    "show": "inspect",
    "info": "inspect",
    "gguf-dump": "inspect",
    "cli": "run",
    "llama-cli": "run",
    "llama-run": "run",
    "main": "run",
    "completion": "generate",
    "llama-completion": "generate",
    "llama-diffusion-cli": "generate",
    "server": "serve",
    "llama-server": "serve",
    "download": "pull",
    "llama-quantize": "quantize",
    "llama-imatrix": "imatrix",
    "llama-bench": "bench",
    "convert_hf_to_gguf.py": "convert",
    "list-devices": "devices",
    "rm": "files are yours to delete: `hf cache` lists and deletes those of the hub's cache",
    "delete": "files are yours to delete: `hf cache` lists and deletes those of the hub's cache",
    "ps": "no model stays loaded in the background; a server lists its own at /v1/models",
    "stop": "no model stays loaded in the background; Ctrl-C or SIGTERM ends a server",
    "create": "pydiffusion convert or quantize makes a GGUF; system message and options are given to chat",
    "push": "to upload a file: hf upload OWNER/NAME FILE.gguf",
    "cp": "a model is a file: copy it with cp, or name it by its path",
    "signin": "to log in to the Hugging Face Hub: hf auth login",
    "login": "to log in to the Hugging Face Hub: hf auth login",
    "perplexity": _NO_PERPLEXITY,
    "llama-perplexity": _NO_PERPLEXITY,
    "gguf-split": "pydiffusion split IN OUT --split-max-size 5G, or pydiffusion merge IN OUT",
    "llama-gguf-split": "pydiffusion split IN OUT --split-max-size 5G, or pydiffusion merge IN OUT",
    "embedding": "embeddings are not available",
    "llama-embedding": "embeddings are not available",
    "tokenize": "from Python: DiffusionModel(path).tokenize(text)",
    "llama-tokenize": "from Python: DiffusionModel(path).tokenize(text)",
    "export-lora": _MERGE,
    "llama-export-lora": _MERGE,
    "convert_lora_to_gguf.py": "pydiffusion lora convert IN OUT; --lora takes the folder as it is, too",
    "llama-mtmd-cli": "run",
    "llama-tts": "a text model; there is no speech",
    "finetune": "tune with PEFT, Unsloth, NeMo or MLX; --lora loads the adapter (docs/adapters.md)",
    "ollama": "its verbs are commands here: pydiffusion run MODEL, pull, list, show",
    "vllm": "its server is pydiffusion serve -m MODEL",
    "update": "pip install --upgrade updates it",
}  # fmt: skip


@dataclass
class Translation:
    """Arguments with the flags of other programs rewritten; notes on those dropped; what is refused."""

    args: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def translate(command: str, args: Sequence[str], own: Mapping[str, bool]) -> Translation:
    """Rewrite the arguments of a command. own: its options by spelling, and whether each takes a value."""
    table = _table(command)
    done = Translation()
    rest = deque(args)
    while rest:
        arg = rest.popleft()
        name, equals, value = arg.partition("=") if arg.startswith("-") else (arg, "", "")
        values = [value] if equals else None
        if arg == "--":
            done.args += [arg, *rest]
            break
        if not arg.startswith("-") or len(arg) < 2 or _is_number(arg):
            is_model = command in _MODEL_AS_OPTION and not {"-m", "--model"} & {*args, *done.args}
            done.args += ["--model", arg] if is_model else [arg]
        elif name in own:
            short = equals and len(name) == 2  # -m=FILE is -m FILE
            done.args += [name, value] if short else [arg]
            done.args += _next(rest) if own[name] and not equals else []
        elif (same := name if name in table else _respelled(name, own, table)) is not None:
            _apply(table.get(same, Ours(same)), name, values, rest, own, done)
        elif _WORD.fullmatch(arg):  # which would be read as -c with the value nv
            done.refused.append(f"No such option: {arg}")
        else:
            done.args.append(arg)
    return done


def _table(command: str) -> dict[str, Meaning]:
    flags = {name: meaning for names, meaning in _FLAGS.items() for name in names.split()}
    if command in _MODEL_FIRST:
        flags |= {"-m": Ours(), "--model": Ours(), "-hf": Ours(prefix="hf.co/")}
    for names, meaning in _OF_COMMAND.get(command, {}).items():
        flags |= dict.fromkeys(names.split(), meaning)
    return flags


def _apply(
    meaning: Meaning,
    name: str,
    value: list[str] | None,
    rest: deque[str],
    own: Mapping[str, bool],
    done: Translation,
) -> None:
    """Add what the flag becomes. value: given with =, else None and the next word if one belongs to it."""
    if isinstance(meaning, Refused):
        done.refused.append(f"{name}: {meaning.hint}")
        if value is None and meaning.has_value:
            _next(rest)
    elif isinstance(meaning, NoEffect):
        done.notes.append(f"{name} has no effect: {meaning.why}")
        if value is None and rest and (meaning.values is None or rest[0] in meaning.values):
            rest.popleft()
    elif isinstance(meaning, Scaled) and meaning.name in own:
        for path in _paths_with_scales(value, rest):
            done.args += [meaning.name, path]
    elif isinstance(meaning, Ours) and not meaning.name:
        done.args[:0] = [meaning.prefix + text for text in (value or _next(rest))]
    elif meaning.name not in own:
        done.refused.append(f"{name}: this command has no {meaning.name}")
        if value is None:
            _next(rest)
    elif own[meaning.name] and isinstance(meaning, Ours):
        done.args += [meaning.name, *(meaning.prefix + text for text in (value or _next(rest)))]
    else:
        done.args.append(meaning.name)


def _paths_with_scales(value: list[str] | None, rest: deque[str]) -> list[str]:
    paths = ",".join(value or _next(rest)).split(",")
    if len(paths) == 1 and rest and _NUMBER.fullmatch(rest[0]):
        return [f"{paths[0]}:{rest.popleft()}"]
    return paths


def _next(rest: deque[str]) -> list[str]:
    return [rest.popleft()] if rest else []


def _respelled(name: str, own: Mapping[str, bool], table: Mapping[str, Meaning]) -> str | None:
    """An option that differs in its dashes only: --max_tokens, -steps, --m."""
    bare = name.lstrip("-").replace("_", "-")
    for spelling in (f"--{bare}", f"-{bare}"):
        if spelling != name and len(bare) > 1 and (spelling in own or spelling in table):
            return spelling
    return None


def _is_number(arg: str) -> bool:
    return arg[1:].replace(".", "", 1).isdigit()
