"""The demo's vision tower: configuration, initial weights, pictures for training, and the loss."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaMultimodalEmbedder
from transformers.models.gemma4.modeling_gemma4 import apply_multidimensional_rope

from pydiffusion.demo import pictures, sudoku

PATCH, POOLING, N_SOFT = 16, 2, 64
"""Square pictures become 256 x 256 pixels: 16 x 16 patches, 8 x 8 soft tokens (of at most 70)."""
SIDE = PATCH * POOLING * 8
CLASSES = ".123456\n"
"""What a soft token can stand for."""
N_CHARACTERS = sudoku.N_CELLS + sudoku.SIZE - 1
N_FILLERS = N_SOFT - N_CHARACTERS
"""The rows' 41 characters are the last soft tokens; the 23 before them carry nothing."""

VISION_CONFIG = {
    "model_type": "gemma4_vision",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "patch_size": PATCH,
    "pooling_kernel_size": POOLING,
    "position_embedding_size": 64,
}
PROCESSOR_CONFIG = {
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_processor_type": "Gemma4ImageProcessor",
    "image_std": [1.0, 1.0, 1.0],
    "max_soft_tokens": 70,
    "patch_size": PATCH,
    "pooling_kernel_size": POOLING,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
SHARD = 500
"""Pictures in a shard."""
WEIGHT_FIXED = 10.0
"""Weight in the last fit of soft tokens that are the same in every picture."""
VISION_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
HELD_OUT_FONTS = ("Manrope", "Caladea", "cmtt", "FjallaOne", "DejaVuSansMono", "SourceSansPro-It")
"""Beginnings of the names of fonts that training never sees."""


class Tower(nn.Module):
    """The vision tower and its projection, apart from the text model."""

    def __init__(self, vision_config, text_config) -> None:
        super().__init__()
        self.vision_tower = AutoModel.from_config(vision_config, attn_implementation="sdpa")
        self.embed_vision = DiffusionGemmaMultimodalEmbedder(vision_config, text_config)
        rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        self.positions = torch.stack([columns, rows], dim=-1).reshape(1, 256, 2)
        soft = torch.arange(N_FILLERS, N_SOFT)
        first = soft // 8 * 2 * 16 + soft % 8 * 2
        self.character_patches = (first[:, None] + torch.tensor([0, 1, 16, 17])).flatten()
        self.heads = nn.ModuleList(nn.Linear(vision_config.hidden_size, 21) for _ in range(2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (n, 64, d) of pictures (n, 256, 256, 3), float in 0 to 1."""
        return self.with_hidden(pixels)[0]

    def with_hidden(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Features, the layers' outputs (n, 256, width), and the last layer's attention logits.

        The logits (n, heads, 164, 256) are those of the patches of the last 41 soft tokens.
        """
        n = pixels.shape[0]
        tower = self.vision_tower
        patches = pixels.view(n, 16, PATCH, 16, PATCH, 3).transpose(2, 3).reshape(n, 256, 3 * PATCH**2)
        positions = self.positions.expand(n, -1, -1)
        padding = torch.zeros(n, 256, dtype=torch.bool)
        hidden = tower.patch_embedder(patches, positions, padding)
        rotary = tower.encoder.rotary_emb(hidden, self.positions)
        outputs = []
        for layer in tower.encoder.layers:
            before = hidden
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
            outputs.append(hidden)
        pooled = hidden.view(n, 8, 2, 8, 2, -1).mean((2, 4)).reshape(n, N_SOFT, -1)
        features = self.embed_vision(pooled * hidden.shape[-1] ** 0.5)
        return features, outputs, self._last_logits(tower.encoder.layers[-1], before, rotary)

    def _last_logits(self, layer: nn.Module, hidden: torch.Tensor, rotary) -> torch.Tensor:
        attention = layer.self_attn
        hidden = layer.input_layernorm(hidden)
        sides = []
        for projection, norm, rows in (
            (attention.q_proj, attention.q_norm, self.character_patches),
            (attention.k_proj, attention.k_norm, torch.arange(256)),
        ):
            states = projection(hidden[:, rows]).unflatten(-1, (-1, attention.head_dim))
            cos, sin = (part[:, rows] for part in rotary)
            sides.append(
                apply_multidimensional_rope(norm(states), cos, sin, self.positions[:, rows]).transpose(1, 2)
            )
        return sides[0] @ sides[1].transpose(2, 3)

    @torch.no_grad()
    def initialize(self) -> None:
        """Initial weights for a short training: attention that starts soft, filters blind to brightness."""
        for name, parameter in self.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(0.5)
            elif "position_embedding_table" in name:
                parameter.copy_(_waves(parameter.shape[1], parameter.shape[2]))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.04)
        filters = self.vision_tower.patch_embedder.input_proj.weight
        filters.normal_(std=0.08)
        filters -= filters.mean(dim=1, keepdim=True)


def _waves(n_positions: int, width: int) -> torch.Tensor:
    """Sines and cosines of x in one half of the width, of y in the other: (2, n_positions, width)."""
    table = torch.zeros(2, n_positions, width)
    n = width // 4
    frequency = 2.0 * 0.03 ** (torch.arange(n) / (n - 1))
    angle = torch.arange(n_positions)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    table[0, :, : 2 * n] = waves
    table[1, :, 2 * n :] = waves
    return table


def training_fonts(folders: list[str]) -> tuple[list[str], list[str]]:
    """(fonts for training, held-out fonts); both also name Pillow's own font first or not at all."""
    files = {Path(path).name: path for folder in folders for path in pictures.font_files(folder)}
    held_out = [path for name, path in files.items() if name.startswith(HELD_OUT_FONTS)]
    return [pictures.DEFAULT_FONT, *(p for p in files.values() if p not in held_out)], held_out


def random_cells(rng: random.Random) -> str:
    """36 random cells, most of them no sudoku at all: the tower has to read, not to guess."""
    share = rng.uniform(0.3, 0.7)
    return "".join(rng.choice("123456") if rng.random() < share else "." for _ in range(sudoku.N_CELLS))


def classes_of(puzzle: str) -> list[int]:
    """Index in CLASSES of each of the 41 characters."""
    return [CLASSES.index(character) for character in sudoku.as_rows(puzzle)]


@dataclass
class Pictures:
    """Pictures with what they show.

    Attributes:
        images: (n, 256, 256, 3) uint8.
        labels: (n, 41) int64, index in CLASSES of each character.
        maps: (n, 256, 256) int8, the cell below each pixel, or -1.
    """

    images: np.ndarray
    labels: np.ndarray
    maps: np.ndarray


def render(n: int, rng: random.Random, fonts: list[str], difficulty: float = 1.0) -> Pictures:
    """Draw `n` pictures of random cells."""
    from PIL import Image

    shape = (n, SIDE, SIDE)
    drawn = Pictures(
        np.empty((*shape, 3), np.uint8), np.empty((n, N_CHARACTERS), np.int64), np.empty(shape, np.int8)
    )
    points = (np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1) + 0.5) / SIDE
    for index in range(n):
        puzzle = random_cells(rng)
        look = pictures.Look.random(rng, fonts, difficulty)
        image = pictures.draw(puzzle, look, rng).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        drawn.images[index], drawn.labels[index] = np.asarray(image), classes_of(puzzle)
        drawn.maps[index] = pictures.cells_at(points, look)
    return drawn


def write_shards(folder: Path, seed: int, fonts: list[str], n_shards: int, easy: bool) -> None:
    """Render `n_shards` shards of pictures into a folder; if `easy`, the first ones are easier."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(n_shards):
        drawn = render(SHARD, rng, fonts, min(1.0, 0.3 + 0.05 * number) if easy else 1.0)
        name = folder / f"{seed:02d}-{number:03d}.part"
        with name.open("wb") as file:
            np.savez(file, **vars(drawn))
        name.rename(name.with_suffix(".npz"))


class Pool:
    """Pictures drawn by other processes; batches are taken at random from the latest `capacity` shards."""

    def __init__(self, folder: Path, seed: int, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity
        self.rng = np.random.default_rng(seed)
        self.seen: set[Path] = set()
        self.shards: list[Pictures] = []

    def refresh(self) -> None:
        """Load the shards that are new; waits for the first one."""
        while True:
            for path in sorted(self.folder.glob("*.npz"), key=lambda path: path.stat().st_mtime):
                if path not in self.seen:
                    self.seen.add(path)
                    with np.load(path) as file:
                        self.shards.append(Pictures(**file))
            self.shards = self.shards[-self.capacity :]
            if self.shards:
                return
            time.sleep(1)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures (size, 256, 256, 3) in 0 to 1, changed a little each time, classes, patches' cells."""
        images, labels, cells = [], [], []
        for _ in range(size):
            shard = self.shards[self.rng.integers(len(self.shards))]
            index = self.rng.integers(len(shard.images))
            image, map_ = self._moved(shard.images[index], shard.maps[index])
            images.append(image)
            labels.append(shard.labels[index])
            cells.append(map_)
        return tuple(torch.from_numpy(np.stack(rows)) for rows in (images, labels, cells))  # type: ignore[return-value]

    def _moved(self, image: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shifted by up to 5 pixels, colours exchanged, inverted at times, other brightness and contrast."""
        rng = self.rng
        down, right = rng.integers(-5, 6, 2)
        rows = np.clip(np.arange(SIDE) + down, 0, SIDE - 1)
        columns = np.clip(np.arange(SIDE) + right, 0, SIDE - 1)
        pixels = image[rows][:, columns][..., rng.permutation(3)].astype(np.float32) / 255
        if rng.random() < 0.2:
            pixels = 1 - pixels
        gain = np.float32(1 + 0.3 * rng.uniform(-1, 0.3))
        pixels = np.clip(pixels * gain + np.float32(rng.uniform(0, 1 - min(gain, 1))), 0, 1)
        centres = np.arange(PATCH // 2, SIDE, PATCH)
        return pixels, cells[rows[centres]][:, columns[centres]].astype(np.int64).ravel()


class ReadingLoss(nn.Module):
    """How far the features are from the text model's embeddings of the characters in the picture.

    Cross-entropy over CLASSES, with minus half the squared distance to each embedding over a temperature as
    logits, plus the squared distance to the right one; of fillers the distance alone.
    """

    def __init__(self, tower: Tower, targets: torch.Tensor, fillers: torch.Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("targets", targets)
        self.register_buffer("fillers", fillers)
        spread = torch.cdist(targets, targets).square()
        self.mean_square = float(spread.sum() / (len(targets) * (len(targets) - 1)))
        self.temperature = self.mean_square / 16
        places = [place for place in range(N_CHARACTERS) if place % (sudoku.SIZE + 1) < sudoku.SIZE]
        self.register_buffer("cell_places", torch.tensor(places))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(..., 8) logits of CLASSES, float32, from float32 features."""
        nearness = features @ self.targets.T - 0.5 * self.targets.square().sum(-1)
        return nearness / self.temperature

    def forward(
        self, pixels: torch.Tensor, labels: torch.Tensor, cells: torch.Tensor, help: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss; `cells` (n, 256): each patch's cell or -1; `help`: weight of the losses within."""
        with torch.autocast("cpu", torch.bfloat16):
            features, outputs, attention = self.tower.with_hidden(pixels)
        features = features.float()
        characters = features[:, N_FILLERS:]
        cross_entropy = nn.functional.cross_entropy(
            self.logits(characters).flatten(0, 1), labels.flatten(), reduction="none"
        )
        distance = (characters - self.targets[labels]).square().sum(-1) / self.mean_square
        each = cross_entropy + 0.5 * distance.flatten()
        fillers = (features[:, :N_FILLERS] - self.fillers).square().sum(-1) / self.mean_square
        loss = each.mean() + 0.5 * fillers.mean()
        return loss + help * (
            self._patch_loss(outputs, labels, cells) + 0.3 * self._gaze_loss(attention, cells)
        )

    def _patch_loss(
        self, outputs: list[torch.Tensor], labels: torch.Tensor, cells: torch.Tensor
    ) -> torch.Tensor:
        """Each patch should know its cell's content, row and column after the second and third layer."""
        outside = cells < 0
        digits = labels[:, self.cell_places].gather(1, cells.clamp(min=0))
        wanted = (
            digits.masked_fill(outside, 0),
            (cells // sudoku.SIZE).masked_fill(outside, 6),
            (cells % sudoku.SIZE).masked_fill(outside, 6),
        )
        loss = torch.zeros(())
        for hidden, head in zip(outputs[1:3], self.tower.heads, strict=True):
            hidden = hidden.float()
            hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
            parts = head(hidden).split(7, dim=-1)
            for part, target in zip(parts, wanted, strict=True):
                loss = loss + nn.functional.cross_entropy(part.flatten(0, 1), target.flatten())
        return loss / 6

    def _gaze_loss(self, attention: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """In the last layer a soft token's patches should look at the patches of its cell."""
        n = cells.shape[0]
        queries = attention.float().unflatten(2, (N_CHARACTERS, 4))[:, :, self.cell_places]
        inside = cells[:, None, :] == torch.arange(sudoku.N_CELLS)[None, :, None]
        total = torch.logsumexp(queries, dim=-1)
        on_cell = torch.logsumexp(queries.masked_fill(~inside[:, None, :, None, :], -1e4), dim=-1)
        seen = inside.any(-1).view(n, 1, -1, 1)
        return ((total - on_cell) * seen).mean()


def character_ids(tokenizer) -> torch.Tensor:
    """(8,) int64: the token of each of CLASSES."""
    ids = [tokenizer.encode(character, add_special_tokens=False).ids for character in CLASSES]
    return torch.tensor(ids)[:, 0]


def character_embeddings(model: nn.Module, tokenizer) -> torch.Tensor:
    """(8, d) float32: what the text model's encoder reads for each of CLASSES."""
    with torch.no_grad():
        return model.model.encoder.language_model.embed_tokens(character_ids(tokenizer)).float().clone()


@torch.no_grad()
def fit_projection(tower: Tower, aims: torch.Tensor, fillers: torch.Tensor, drawn: Pictures) -> None:
    """Solve for the projection by least squares, the last step of the training.

    aims: (8, d) of CLASSES. fillers: (23, d). drawn: pictures in fonts of the training.
    """
    normalized = []
    hook = tower.embed_vision.embedding_projection.register_forward_pre_hook(
        lambda _, given: normalized.append(given[0].view(-1, N_SOFT, given[0].shape[-1]))
    )
    for start in range(0, len(drawn.images), 50):
        tower(torch.from_numpy(drawn.images[start : start + 50]).float() / 255)
    hook.remove()
    inputs = torch.cat(normalized).double()
    n = len(inputs)
    wanted = torch.cat([fillers.expand(n, -1, -1), aims[torch.from_numpy(drawn.labels)]], dim=1).double()
    # The answer's line breaks suffer when those of the picture, or the fillers, are only nearly right.
    labels = torch.from_numpy(drawn.labels)
    weight = torch.ones(n, N_SOFT, 1, dtype=torch.float64)
    weight[:, :N_FILLERS] = WEIGHT_FIXED
    weight[:, N_FILLERS:][labels == CLASSES.index("\n")] = WEIGHT_FIXED
    inputs, wanted, weight = inputs.flatten(0, 1), wanted.flatten(0, 1), weight.flatten(0, 1)
    gram = inputs.T @ (weight * inputs) + 1e-4 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(gram, inputs.T @ (weight * wanted))
    tower.embed_vision.embedding_projection.weight.copy_(solved.T)


def export(tower: Tower, folder: Path) -> None:
    """Put the tower beside the text weights of a released checkpoint folder, which keep their bytes.

    Writes the vision tensors (bfloat16) into model.safetensors, the tower's shape into config.json, and
    preprocessor_config.json.
    """
    path = folder / "model.safetensors"
    tensors = {
        name: tensor for name, tensor in load_file(path).items() if not name.startswith(VISION_PREFIXES)
    }
    for name, tensor in tower.state_dict().items():
        full = "model.encoder." + name
        if full.startswith(VISION_PREFIXES):
            tensors[full] = tensor.detach().to(torch.bfloat16).contiguous()
    save_file(tensors, path.with_suffix(".part"), metadata={"format": "pt"})
    path.with_suffix(".part").chmod(0o644)
    path.with_suffix(".part").replace(path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= VISION_CONFIG
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR_CONFIG, indent=2) + "\n")
