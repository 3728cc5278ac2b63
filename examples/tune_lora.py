"""Tune the demo model with LoRA: PEFT, on the class of transformers, for a sudoku that the model can't solve.

The boxes of these sudokus are 3 rows by 2 columns; the demo model learned 2 by 3. Its weights stay as they
are. Needs the `reference` extra (torch, transformers, peft). Saves every 50 steps and at Ctrl-C.

    python examples/tune_lora.py --out build/upright_lora
    pydiffusion demo --lora build/upright_lora
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # share the cores with other programs

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import kl_div, log_softmax

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_recipe.data import Examples, make_pool
from demo_recipe.evaluate import load_checkpoint

from pydiffusion.demo import checkpoint_path

# Attention and dense MLP of both modes, and self-conditioning; of the encoder's last layer only the keys, as
# nothing reads the rest. Together below 1 MB in bfloat16.
CONFIG = LoraConfig(
    r=16,
    lora_alpha=16,
    rank_pattern={"encoder.*": 6},
    alpha_pattern={"encoder.*": 6},
    target_modules=(
        r"model\.(decoder|encoder\.language_model)\."
        r"(layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
        r"|self_conditioning\.(gate|up|down)_proj)"
    ),
    exclude_modules=r".*encoder\.language_model\.layers\.5\.(self_attn\.[qo]_proj|mlp\..*)",
)
# Of the sampler, as in generation_config.json.
STEPS, T_MIN, T_MAX, ENTROPY_BOUND, CONFIDENCE = 48, 0.4, 0.8, 0.1, 0.005
ORDER = np.arange(36).reshape(6, 6).T.ravel()


def exchanged(length: int, cells: np.ndarray) -> torch.Tensor:
    """Positions of a text with a sudoku's rows and columns exchanged; `cells`: where its cells are."""
    order = np.arange(length)
    order[cells] = cells[ORDER]
    return torch.from_numpy(order)


class UprightSudokus(Examples):
    """Training puzzles: those of the demo model, rows and columns exchanged."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.prompt_order = exchanged(len(self.sudoku_prompt), self.prompt_cells)
        self.canvas_order = exchanged(len(self.sudoku_canvas), self.canvas_cells)

    def _sudoku_row(self) -> tuple[np.ndarray, np.ndarray]:
        prompt, canvas = super()._sudoku_row()
        prompt[self.prompt_cells] = prompt[self.prompt_cells][ORDER]
        canvas[self.canvas_cells] = canvas[self.canvas_cells][ORDER]
        shown = self.rng.sample(range(36), self.rng.randint(0, 9))  # some of the puzzles are easier
        prompt[self.prompt_cells[shown]] = canvas[self.canvas_cells[shown]]
        return prompt, canvas


class Rollouts:
    """Examples that are denoised by one step of the sampler per step of training, from noise until solved.

    So the model trains on what it meets in generation: its own drafts, its own logits as self-conditioning.
    Solved is as the sampler sees it, right and sure: else the model never learns to stay with its answer.
    Half of the examples start from pure noise, the others from their answer, a part replaced by noise.
    """

    def __init__(self, model: PeftModel, examples: UprightSudokus, n: int, patience: int) -> None:
        self.model, self.examples, self.patience = model, examples, patience
        self.n_vocab = model.config.text_config.vocab_size
        self.batch = examples.batch(n, 0)  # prompts of equal length: others would need attention masks
        self.canvas = self._noised(self.batch.target)
        self.logits = torch.zeros(*self.canvas.shape, self.n_vocab)
        self.age = torch.zeros(n, dtype=torch.int64)
        self.last = torch.randint(1, patience + 1, (n,))
        self.teacher_cache = self._encode_for_teacher(self.batch.prefix)
        self.n_solved = self.n_finished = 0

    def _noised(self, target: torch.Tensor) -> torch.Tensor:
        n = len(target)
        share = torch.where(torch.rand(n, 1) < 0.5, 1.0, torch.rand(n, 1))
        noise = torch.randint(0, self.n_vocab, target.shape)
        return torch.where(torch.rand(target.shape) < share, noise, target)

    @torch.no_grad()
    def _encode_for_teacher(self, prompts: torch.Tensor):
        with self.model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
            return (
                self.model.get_base_model()
                .model.encoder(input_ids=prompts[:, self.examples.prompt_order])
                .past_key_values
            )

    @torch.no_grad()
    def _teacher(self) -> torch.Tensor:
        """Logits of the model as it was, which sees rows and columns exchanged: that puzzle it can solve."""
        order = self.examples.canvas_order
        with self.model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
            logits = self.model(
                past_key_values=self.teacher_cache,
                decoder_input_ids=self.canvas[:, order],
                self_conditioning_logits=self.logits[:, order],
                self_conditioning_mask=self.age > 0,
            ).logits
        return logits[:, order]  # exchanged twice: back in place

    def loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance from the teacher's distributions (KL), and the logits for `advance`.

        Where there is no teacher, it is the cross-entropy with the answer, `self.batch.target`.
        """
        teacher = self._teacher()
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(
                input_ids=self.batch.prefix,
                decoder_input_ids=self.canvas,
                self_conditioning_logits=self.logits,
                self_conditioning_mask=self.age > 0,
            ).logits
        wanted = log_softmax(teacher, dim=-1)
        distance = kl_div(log_softmax(logits, dim=-1), wanted, reduction="none", log_target=True)
        target = self.batch.target
        self.right = [(one.argmax(-1) == target).float().mean() for one in (teacher, logits)]
        return distance.sum(-1).mean(), logits.detach()

    def advance(self, logits: torch.Tensor) -> None:
        """Take a step of the entropy-bound sampler, and replace the examples that are solved or too old."""
        remaining = 1 - self.age[:, None, None] / STEPS
        self.logits = logits / (T_MIN + (T_MAX - T_MIN) * remaining)
        distribution = torch.distributions.Categorical(logits=self.logits)
        entropy = distribution.entropy()
        ascending, order = torch.sort(entropy, dim=-1)
        sure = torch.cumsum(ascending, dim=-1) - ascending <= ENTROPY_BOUND
        accepted = torch.zeros_like(sure).scatter(1, order, sure)
        noise = torch.randint(0, self.n_vocab, self.canvas.shape)
        self.canvas = torch.where(accepted, distribution.sample(), noise)
        self.age += 1
        solved = (logits.argmax(-1) == self.batch.target).all(-1) & (entropy.mean(-1) < CONFIDENCE)
        self._replace((solved | (self.age >= self.last)).nonzero().flatten())
        self.n_solved += int(solved.sum())

    def _replace(self, rows: torch.Tensor) -> None:
        if len(rows) == 0:
            return
        fresh = self.examples.batch(len(rows), 0)
        for name in ("prefix", "target"):
            getattr(self.batch, name)[rows] = getattr(fresh, name)
        for layer, new in zip(
            self.teacher_cache.layers, self._encode_for_teacher(fresh.prefix).layers, strict=True
        ):
            layer.keys[rows], layer.values[rows] = new.keys, new.values
        self.canvas[rows] = self._noised(fresh.target)
        self.age[rows] = 0
        self.last[rows] = torch.randint(1, self.patience + 1, rows.shape)
        self.n_finished += len(rows)


class Average:
    """Moving average of the adapter's weights, which is what is saved."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.n = parameters, decay, 0
        self.means = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        torch._foreach_lerp_(self.means, self.parameters, 1 - min(self.decay, self.n / (self.n + 5)))

    @torch.no_grad()
    def save(self, model, folder: Path) -> None:
        """Write the averages as PEFT does, in bfloat16."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            parameter.data = mean.to(torch.bfloat16)
        model.save_pretrained(folder)
        for parameter, value in zip(self.parameters, kept, strict=True):
            parameter.data = value


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of the weights that are not tuned."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in frozen)).hexdigest()


def rate(step: int, progress: float) -> float:
    """Factor of the learning rate: warm-up, plateau, cosine from a third of the time on."""
    falling = min(1.0, max(0.0, (3 * progress - 1) / 2))
    return min(1.0, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling)))


def train(model: PeftModel, rollouts: Rollouts, average: Average, arguments: argparse.Namespace) -> None:
    """Train for the minutes asked for."""
    adam = torch.optim.AdamW(average.parameters, betas=(0.9, 0.98), weight_decay=0.0)
    figures: list[torch.Tensor] = []
    start = time.monotonic()
    while (minutes := (time.monotonic() - start) / 60) < arguments.minutes:
        loss, logits = rollouts.loss()
        loss.backward()
        rollouts.advance(logits)
        torch.nn.utils.clip_grad_norm_(average.parameters, 1.0)
        adam.param_groups[0]["lr"] = arguments.rate * rate(average.n, minutes / arguments.minutes)
        adam.step()
        adam.zero_grad()
        average.update()
        figures.append(torch.stack([loss.detach(), *rollouts.right]))
        if average.n % 50 == 0:
            mean, teacher, own = (sum(figures) / len(figures)).tolist()
            print(
                time.strftime("%H:%M:%S"),
                f"step {average.n} minutes {minutes:.1f} of the cores {time.process_time() / 60:.1f}"
                f" loss {mean:.4f} right (teacher, model) {teacher:.4f} {own:.4f}"
                f" solved {rollouts.n_solved} of {rollouts.n_finished}",
                flush=True,
            )
            figures.clear()
            rollouts.n_solved = rollouts.n_finished = 0
            average.save(model, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--start", type=Path, help="adapter folder to continue from")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--patience", type=int, default=24, help="most steps with an example")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    base, tokenizer = load_checkpoint(checkpoint_path())
    base.set_experts_implementation("dense_demo")  # faster for four small experts
    model = get_peft_model(base, CONFIG)
    if arguments.start:
        set_peft_model_state_dict(model, load_file(arguments.start / "adapter_model.safetensors"))
    model.peft_config["default"].base_model_name_or_path = "pydiffusion/demo/checkpoint"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = digest(model)
    print(f"{sum(p.numel() for p in parameters)} weights in {len(parameters)} matrices", flush=True)
    examples = UprightSudokus(tokenizer, make_pool(4000, arguments.seed + 1), arguments.seed + 2)
    rollouts = Rollouts(model, examples, arguments.batch, arguments.patience)
    average = Average(parameters, decay=0.98)
    try:
        train(model, rollouts, average, arguments)
    except KeyboardInterrupt:
        print("stopped", flush=True)
    average.save(model, arguments.out)
    if digest(model) != before:
        raise RuntimeError("the base model's weights changed")
    print(f"wrote {arguments.out}; the base model's weights are as before, sha256 {before[:16]}")


if __name__ == "__main__":
    main()
