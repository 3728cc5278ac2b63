"""Find words of our own where the field has a term, in code, messages and documents.

    python scripts/words.py [WORD...]

Prints ``path:line: the text: say ...`` for each, of the words named or of all; exit code 1 when there is one.
A person who knows llama.cpp or vLLM should read this repository without a dictionary.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

FOLDERS = ("native", "pydiffusion", "convert", "tests", "scripts", "benchmarks", "examples", "fuzz", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
SUFFIXES = {
    ".py",
    ".pyi",
    ".h",
    ".cuh",
    ".cpp",
    ".cu",
    ".cmake",
    ".txt",
    ".md",
    ".sh",
    ".html",
    ".js",
    ".css",
}
# Data, and the two files that have to name the words.
LEFT_OUT = (
    "tests/reference/goldens/*", "fuzz/corpus/*", "pydiffusion/demo/*.txt",
    "scripts/words.py", "tests/unit/test_words.py",
)  # fmt: skip


# Between two words: white space, a line break with the mark of a comment behind it.
_GAP = r"(?:[ \t]+|[ \t]*\n[ \t]*(?:(?://|#|\*|>)[ \t]*)?)"


@dataclass(frozen=True)
class Rule:
    """A word, the pattern that finds it, and what to say instead.

    A space in the pattern also matches a line break and the comment mark behind it.
    where: folders and files it is looked for in.
    allowed: (file pattern, pattern of the line, why) of uses that are no fault.
    """

    word: str
    pattern: str
    say: str
    where: Sequence[str] = (*FOLDERS, *PAGES)
    allowed: Sequence[tuple[str, str, str]] = ()


CODE = ("native", "pydiffusion", "convert")
RULES = (
    Rule(
        "product", r"\b[Pp]roducts?\b|\bproduct_ops\b", "matmul, tile GEMM, result",
        allowed=(
            ("*.py", r"itertools\.product|import product", "the function"),
            ("convert/verification.py", r"product", "of two norms, in a cosine"),
            ("native/gguf/gguf_file.cpp", r"whose product overflows", "of a tensor's dimensions"),
            ("native/backend/cpu/*", r"dot product|Vector product;|product\.lane", "of vectors"),
            ("native/backend/cpu/*", r"product of (?:the )?two|products of halves", "of two factors"),
        ),
    ),
    Rule(
        "columns", r"\bn?_?columns?\b|\bcolumns?_\w+", "activations",
        where=("native", "pydiffusion"),
        allowed=(
            ("native/backend/cpu/simd_gemm.h", r"", "of a matrix"),
            ("native/backend/cpu/*", r"column 4 q|column c is", "of a matrix"),
            ("native/bindings/sampler.cpp", r"logits has 0 columns", "of an array"),
            ("native/vision/*", r"", "of a grid of patches"),
            ("native/b*", r"picture: column and row|column and row of each", "of a grid of patches"),
            ("pydiffusion/_native.pyi", r"column and row of each", "of a grid of patches"),
            ("native/quantization/*", r"", "of a weight's matrix, by importance"),
            ("pydiffusion/constrained/grammar.py", r"line and column|column\b", "of a text"),
            ("pydiffusion/testing/synthetic.py", r"n_columns", "of a weight's matrix"),
            ("pydiffusion/cli/*", r"", "of text and of tables"),
            ("pydiffusion/server/static/page.css", r"flex-direction", "of a page"),
            ("pydiffusion/demo/sudoku.py", r"", "of a sudoku"),
            ("pydiffusion/demo/upright.py", r"", "of a sudoku"),
            ("pydiffusion/demo/pictures.py", r"", "of a sudoku"),
            ("pydiffusion/vision/*", r"", "of an image"),
            ("pydiffusion/constrained/guide.py", r"", "of an array of candidates"),
        ),
    ),
    Rule("numbers", r"\b(?:b?float16|float32|floats?|int8|\d+) numbers\b|\w+Numbers\b|\bn_numbers\b",
         "elements, values", where=("native",)),
    Rule("processor", r"\b[Pp]rocessors?\b|\bkProcessor\b", "the CPU",
         allowed=(
             ("convert/checkpoint/*", r"processor = source|in processor|processor\.get", "of tokenizers"),
             ("*", r"image processor", "of vision models: Hugging Face's class"),
             ("examples/evaluate_demo_vision.py", r"\bprocessor\b", "the same"),
             ("*", r"[Pp]ost-processor|^    post-", "of tokenizers"),
             ("tests/convert/*", r"if processor|\bprocessor: bool|\"processor\"", "of tokenizers"),
             ("benchmarks/*", r"platform\.processor|Xeon\(R\) Processor", "a function; a CPU's name"),
         )),
    Rule(
        "lane", r"\b[Ll]anes?\b|_lanes?\b|\blanes?_", "sequence, in-flight request, slot",
        allowed=(
            ("native/backend/*", r"", "of SIMD vectors and warps"),
            ("native/tests/*", r"", "of warps"),
            ("scripts/mutate_kernels.py", r"", "of warps"),
            ("docs/dev/gpu-kit.md", r"lanes of a mask|highest lane|the other lanes'", "of warps"),
            ("native/sampler/logits.cpp", r"", "of SIMD vectors"),
            ("native/quantization/quantize.cpp", r"", "of SIMD vectors"),
            ("native/util/simd_math.h", r"", "of SIMD vectors"),
            ("native/bench/roofline.cpp", r"", "of SIMD vectors"),
            ("docs/*", r"SIMD|no lane's result|lanes of the vectors", "of vectors"),
            ("docs/*", r"`(?:pydiffusion_)?lanes", "a metric's name"),
            ("pydiffusion/server/metrics.py", r'"lanes(?:_limit)?"', "a metric's name, which dashboards use"),
            ("tests/server/*", r"pydiffusion_lanes", "the metric's name"),
        ),
    ),
    Rule("placement", r"(?<!device )\b[Pp]lacements?\b", "device plan, device"),
    Rule("engine", r"\b[Ee]ngines?\b", "backend"),
    Rule("home", r"\bhomes?\b|\bhome_\w*", "main device", where=("native",)),
    Rule("portable", r"\bportable_ops\b|\bportable (?:ops|graphs?|operations)\b", "ggml ops"),
    # Phrases
    Rule("not to be had", r"\b(?:be|been) had\b", "failed to allocate, is not available"),
    Rule("in the making", r"\bin the making\b|\bof their making\b", "in-flight requests, slots"),
    Rule("is none", r"(?<!there )\b(?:is|are) none\b", "is invalid, is not a ..."),
    Rule("stands", r"(?<!as it )(?<!as they )\b[Ss]tands?\b(?! (?:for|in for|out|alone|still)\b|-)",
         "is, is given, is stored"),
    Rule(
        "lies", r"\b[Ll]ies?\b(?! (?:within|inside|between|beyond|near|(?:no )?further|apart)\b)",
        "is, is stored",
    ),
    Rule("brings", r"\bbrings\b", "gives, includes"),
    Rule("turned over", r"\bturned over\b", "transposed"),
    Rule("taken back", r"\btaken back\b", "rolled back"),
    Rule("What a ...", r'"""What\b|^[^\S\n]*// What (?:an?|the)\b', "an imperative or a noun phrase",
         where=(*CODE, "scripts")),
    # Identifiers
    Rule("unsound", r"[Uu]nsound", "non-finite, has_nonfinite"),
    Rule("best_rows", r"best_rows", "top_k"),
    Rule("filled_up", r"filled_up", "pad_to"),
    Rule("require_whole", r"require_whole", "require_not_truncated"),
    Rule("keep_with", r"keep_with", "pin_to_device_of"),
    Rule("row_ops", r"\brow_ops\b", "fused_rows"),
    Rule("machine_rates", r"machine_rates", "roofline"),
    Rule("StepKernels", r"\bStepKernels\b|\bstep_kernels\b", "StepBackend",
         allowed=(("*", r"step_kernels", "files of the CUDA kernels"),)),
    Rule(
        "Hyperparameters",
        r"\b(?:struct|class|const) Hyperparameters\b|\bHyperparameters[&*>({:`]"
        r"|\bhyperparameters\.(?:h|cpp|\*)",
        "Hparams, hparams.h",
    ),
    Rule("statistics", r"\bcollect_statistics\b|\bstatistics\.(?:h|cpp|\*)", "imatrix, imatrix_collector"),
    Rule("matrix/", r"(?<![\w.])matrix/", "backend/cpu/amx/"),
    Rule(
        "old modules",
        r"\bpydiffusion[./](?:parallel|completion|injection|structure|limits|placement)\b|\bchat_output\b",
        "generation.batching, openai.responses, chat.output_parser, chat.sanitize, constrained, "
        "generation.thinking_budget, device_plan",
        allowed=(
            ("scripts/layers.py", r"chat_output", "keeps names of 0.1.0 importable"),
            ("tests/unit/test_api.py", r"chat_output", "keeps names of 0.1.0 importable"),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    rule: Rule
    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path.as_posix()}:{self.line}: {self.text!r}: say {self.rule.say}"


def texts(root: Path) -> dict[Path, str]:
    """The files that are looked through, by their path below the root."""
    paths = [root / page for page in PAGES if (root / page).is_file()]
    for folder in FOLDERS:
        paths += sorted(path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)
    found = {path.relative_to(root): path for path in paths if path.is_file()}
    return {
        relative: path.read_text(encoding="utf-8")
        for relative, path in found.items()
        if not any(fnmatch(relative.as_posix(), pattern) for pattern in LEFT_OUT)
    }


def find(
    texts: Mapping[Path, str], rules: Sequence[Rule] = RULES, used: set[tuple[str, str, str]] | None = None
) -> Iterator[Finding]:
    """Uses that no rule allows. used: gets the exceptions that something was allowed by."""
    for rule in rules:
        pattern = _compiled(rule.pattern)
        for path, text in texts.items():
            if path.parts[0] not in rule.where:
                continue
            for match in pattern.finditer(text):
                start = text.rfind("\n", 0, match.start()) + 1
                line = text[start : text.find("\n", match.start())]
                entry = next((entry for entry in rule.allowed if _allows(entry, path, line)), None)
                if entry is None:
                    number = text.count("\n", 0, match.start()) + 1
                    yield Finding(rule, path, number, " ".join(match[0].split()))
                elif used is not None:
                    used.add(entry)


def _compiled(pattern: str) -> re.Pattern[str]:
    """With a gap for every space but those of lookbehinds, which have to be of one width."""
    spaced = re.sub(r"(\(\?<[!=][^)]*\))| ", lambda found: found[1] or _GAP, pattern)
    return re.compile(spaced, re.MULTILINE)


def _allows(entry: tuple[str, str, str], path: Path, line: str) -> bool:
    return fnmatch(path.as_posix(), entry[0]) and re.search(entry[1], line) is not None


def main(words: Sequence[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    unknown = sorted(set(words) - {rule.word for rule in RULES})
    if unknown:
        print(f"no rule for {unknown[0]!r}; there are {', '.join(rule.word for rule in RULES)}")
        return 2
    rules = [rule for rule in RULES if not words or rule.word in words]
    found = list(find(texts(root), rules))
    print(*found, f"{len(found)} words to replace", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
