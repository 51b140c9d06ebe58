"""Cold start of the thinking mode for a small model: a short reasoning that names the distortion it was shown.

    python -m recipes.nano.reasoning --model nano --pristine DIR --data labels.csv --images DIR -o out/

A frozen copy of the model is the teacher of all scores. The blocks of the vision tower rest, so what they make of a
picture is computed once; its last layer (the merger) and the language model are trained over that, in minutes on one
CPU core. Two stages:

1. Undistorted pictures, and the same with one distortion at a known strength: the reasoning names it. Beside that the
   non-thinking answer must stay what the teacher's is, token by token, on these and on rated pictures.
2. The same, and rated pictures in the thinking mode too. What is wrong with them nobody has said: their reasoning is
   what the model of stage 1 names, which is given and not taught; taught is the score that follows it.

The score after the reasoning is the teacher's answer to the non-thinking question, as a distribution.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from recipes.nano.naming import CLEAN, PHRASES, remark, thought
from vqr1_metric.backends.loading import LoadedModel, ModelSpec, load_model
from vqr1_metric.backends.pixels import to_patches
from vqr1_metric.backends.readout import build_answer_trie, read_distribution
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.images import SUFFIXES, load_image
from vqr1_metric.images.distortions import DISTORTIONS, LEVELS, distort
from vqr1_metric.protocol import VISUALQUALITY_R1
from vqr1_metric.train_ranker.data import read_data, split_validation

REMARKED = [*PHRASES.values(), CLEAN.split(" ", 1)[1]]
"""What follows the first word of a remark."""
Pictures = Iterator[tuple[Image.Image, str | None]]
"""Pictures with the remarks on them."""
MOST_TOKENS = 400
"""Visual tokens shown at most: a grid drawn from those of a smaller picture stands for a larger one."""
CROP = 256
TEXT_TOKENS = 100
"""About as many are not visual."""
LOWEST_LEVEL = 2
"""Strength from which on a distortion is taught; the mildest can hardly be seen."""


@dataclass
class Shown:
    """A picture that the blocks of the vision tower have seen.

    Args:
        tokens: the patches of each visual token side by side, before the merger, ``(T, M)``, rows of the picture first.
        grid: rows and columns.
        remark: what the reasoning says of it, None where nobody has said.
        scores: probabilities of the teacher's 401 scores.
    """

    tokens: Tensor
    grid: tuple[int, int]
    remark: str | None
    scores: Tensor | None = None


class TokenReader:
    """Merger and language model of a Qwen-VL over what the blocks of its vision tower said before."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        backend = TransformersBackend(ModelSpec("reasoning"), loaded)
        self.prompts = {thinking: backend._prompts.segments(VISUALQUALITY_R1, thinking) for thinking in (False, True)}
        self.trie = build_answer_trie(self.tokenizer, ("",))
        self._positions: dict[tuple, Tensor] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of a reply."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def merge(self, visual: Tensor) -> Tensor:
        """Visual tokens ``(B, T, D)`` of the patches of :class:`Shown`, ``(B, T, M)``."""
        merger = self.model.model.visual.merger
        patches = visual.unflatten(-1, (-1, self.model.config.vision_config.hidden_size))
        return merger(patches.flatten(0, 2)).view(*visual.shape[:2], -1)

    def positions(self, grid: tuple[int, int], thinking: bool) -> Tensor:
        """Positions of the prompt, ``(3, 1, P)``."""
        if (grid, thinking) not in self._positions:
            before, after = self.prompts[thinking]
            config = self.model.config
            ids = torch.tensor([[*before, *[config.image_token_id] * (grid[0] * grid[1]), *after]])
            merge = config.vision_config.spatial_merge_size
            self._positions[grid, thinking], _ = self.model.model.get_rope_index(
                input_ids=ids,
                mm_token_type_ids=(ids == config.image_token_id).int(),
                image_grid_thw=torch.tensor([[1, grid[0] * merge, grid[1] * merge]]),
                attention_mask=torch.ones_like(ids),
            )
        return self._positions[grid, thinking]

    def hidden(
        self,
        visual: Tensor,
        grid: tuple[int, int],
        thinking: bool,
        tail: Tensor,
        depths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``(B, 1 + A, D)`` at the last token of the prompt and at those of the tail.

        Args:
            visual: visual tokens, ``(B, T, D)``.
            grid: rows and columns of the T tokens.
            tail: token ids that follow the prompt, ``(B, A)``.
            depths: how many tokens after the prompt each stands, by default 1, 2, ...
            mask: who in the tail sees whom, ``(A, A)``, by default each those before it.
        """
        language, count, length = self.model.model.language_model, len(visual), tail.shape[1]
        before, after = (
            language.embed_tokens(torch.tensor(ids)).expand(count, -1, -1) for ids in self.prompts[thinking]
        )
        positions = self.positions(grid, thinking)
        depths = torch.arange(1, length + 1) if depths is None else depths
        positions = torch.cat([positions, positions[:, :, -1:] + depths], dim=2)
        attention = None
        if mask is not None:
            prompt = positions.shape[2] - length
            attention = torch.ones(prompt + length, prompt + length, dtype=torch.bool).tril()
            attention[prompt:, prompt:] = mask
            attention = attention[None, None].expand(count, 1, -1, -1)
        output = language(
            inputs_embeds=torch.cat([before, visual, after, language.embed_tokens(tail)], dim=1),
            attention_mask=attention,
            position_ids=positions.expand(3, count, -1),
            use_cache=False,
        )
        return output.last_hidden_state[:, -(1 + length) :]

    @torch.no_grad()
    def distribution(self, visual: Tensor, grid: tuple[int, int]) -> ScoreDistribution:
        """Score distributions for the non-thinking question."""
        tail = self.trie.tokens.expand(len(visual), -1)
        hidden = self.hidden(visual, grid, False, tail, self.trie.depths, self.trie.ancestors())
        return read_distribution(hidden, self.model.get_output_embeddings(), self.trie)

    def log_probabilities(self, visual: Tensor, grid: tuple[int, int], thinking: bool, tail: Tensor) -> Tensor:
        """Of every token at every place of the tail, ``(B, A, vocabulary)``."""
        hidden = self.hidden(visual, grid, thinking, tail)[:, :-1].float()
        with torch.autocast("cpu", enabled=False):
            return self.model.get_output_embeddings()(hidden).log_softmax(-1)

    @torch.no_grad()
    def continue_text(self, visual: Tensor, grid: tuple[int, int], start: str, end: str, most: int) -> list[str]:
        """The most probable continuations of ``start`` for the thinking question, up to ``end``."""
        begun = self.encode(start)
        tail = torch.tensor([begun] * len(visual))
        for _ in range(most):
            following = self.hidden(visual, grid, True, tail)[:, -1]
            tail = torch.cat([tail, self.model.get_output_embeddings()(following).argmax(-1)[:, None]], dim=1)
        texts = [self.tokenizer.decode(row[len(begun) :].tolist()) for row in tail]
        return [text.split(end)[0].strip() for text in texts]


class _SideBySide(torch.nn.Module):
    """In place of a merger: the patches of each visual token, not merged. The tower then puts them in order."""

    def __init__(self, merge_size: int) -> None:
        super().__init__()
        self.patches = merge_size**2

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.view(-1, self.patches * hidden.shape[-1])


@torch.no_grad()
def see(loaded: LoadedModel, pictures: Pictures, reader: TokenReader) -> list[Shown]:
    """What the blocks make of pictures, with the remarks on them and the teacher's scores."""
    shown, merge, visual = [], loaded.pixel_config.merge_size, loaded.model.model.visual
    merger, visual.merger = visual.merger, _SideBySide(merge)
    try:
        for picture, said in pictures:
            patches, (_, height, width) = to_patches(load_image(picture), loaded.pixel_config)
            tokens = visual(patches, grid_thw=torch.tensor([[1, height, width]])).pooler_output
            shown.append(Shown(tokens.half(), (height // merge, width // merge), said))
    finally:
        visual.merger = merger
    for grid in sorted({one.grid for one in shown}):
        group = [one for one in shown if one.grid == grid]
        for i in range(0, len(group), 16):
            part = group[i : i + 16]
            visual = reader.merge(torch.stack([one.tokens for one in part]).float())
            scores = reader.distribution(visual, grid).probabilities
            for one, probabilities in zip(part, scores, strict=True):
                one.scores = probabilities
    return shown


def crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square part of at most `CROP` pixels a side: a quarter of the work of a whole picture, and as telling."""
    left, top = (int(rng.integers(max(1, side - CROP + 1))) for side in picture.size)
    width, height = (min(CROP, side) for side in picture.size)
    return picture.crop((left, top, left + width, top + height))


def collect(options: argparse.Namespace, rng: np.random.Generator) -> tuple[Pictures, Pictures]:
    """Pictures to name, undistorted and distorted, whole and in part; and rated ones, of which nothing is known."""
    paths = sorted(p for p in Path(options.pristine).iterdir() if p.suffix.lower() in SUFFIXES)
    (rated,) = read_data([options.data], [options.images])
    train, _ = split_validation(rated, 0.0)
    best = sorted(train.pictures, key=lambda p: -p.mos)[: options.best]
    others = [train.pictures[i] for i in rng.permutation(len(train))[: options.rated]]

    def opened(source) -> Image.Image:
        return Image.fromarray(load_image(source).permute(1, 2, 0).numpy())

    def named() -> Pictures:
        to_come: list[str | None] = []
        for source in [*paths, *(p.read for p in best)]:
            picture = opened(source() if callable(source) else source)
            for version in range(options.versions):
                if not to_come:  # each distortion equally often, in ever new order, and undistorted ones twice
                    to_come = [[*DISTORTIONS, None, None][i] for i in rng.permutation(len(DISTORTIONS) + 2)]
                name, level, seed = to_come.pop(), int(rng.integers(LOWEST_LEVEL, LEVELS + 1)), int(rng.integers(2**31))
                part = picture if version % 4 == 0 else crop(picture, rng)
                yield (part, remark(None)) if name is None else (distort(part, name, level, seed), remark(name, level))

    return named(), ((opened(p.read()), None) for p in others)


def drawn_grid(rng: np.random.Generator) -> tuple[int, int]:
    """Rows and columns of 16 to `MOST_TOKENS` visual tokens, few more often than many, up to about 3 to 1."""
    count = np.exp(rng.uniform(np.log(16), np.log(MOST_TOKENS)))
    rows = max(2, round(float(np.sqrt(count * np.exp(rng.uniform(-0.8, 0.8))))))
    return rows, max(2, min(MOST_TOKENS // rows, round(count / rows)))


def batch_of(pool: Sequence[Shown], count: int, rng: np.random.Generator) -> tuple[list[Shown], Tensor, tuple]:
    """Pictures of one grid: their own, or one for all, drawn with replacement from the tokens of each.

    About ``count`` pictures, fewer of large grids and more of small ones, so that steps take about equally long.
    """
    own = rng.random() < 0.4
    grid = pool[rng.integers(len(pool))].grid if own else drawn_grid(rng)
    fitting = [one for one in pool if one.grid == grid] if own else pool
    count = min(len(fitting), max(2, round(count * 2 * TEXT_TOKENS / (TEXT_TOKENS + grid[0] * grid[1]))))
    chosen = [fitting[i] for i in rng.choice(len(fitting), count, replace=False)]
    if own:
        return chosen, torch.stack([one.tokens for one in chosen]).float(), grid
    places = [np.sort(rng.integers(0, len(one.tokens), grid[0] * grid[1])) for one in chosen]
    tokens = [one.tokens[torch.from_numpy(place)] for one, place in zip(chosen, places, strict=True)]
    return chosen, torch.stack(tokens).float(), grid


def losses(
    student: TokenReader,
    teacher: TokenReader,
    chosen: list[Shown],
    visual: Tensor,
    grid: tuple[int, int],
    *,
    thinking: bool,
    taught: bool,
    hint: torch.nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of the answers from the teacher's (both questions), and cross entropy of the taught reasonings.

    Args:
        thinking: let the student answer the thinking question too.
        taught: whether the remarks are taught or only given; the level of quality after them is taught either way.
        hint: tells the distortion from the mean and spread of the visual tokens, and so shows the merger what to keep
            long before the language model has learnt to look for it; not part of the model.
    """
    drawn = torch.multinomial(torch.stack([one.scores for one in chosen]).float(), 1)[:, 0]
    scores = (1 + drawn / 100).tolist()
    answers = [student.encode(f"<answer>{score:.2f}</answer>{student.tokenizer.eos_token}") for score in scores]
    answer = torch.tensor(answers)
    with torch.no_grad():
        wanted = teacher.log_probabilities(teacher.merge(visual), grid, False, answer)
    visual = student.merge(visual)

    def divergence(log_probabilities: Tensor) -> Tensor:
        return (wanted.exp() * (wanted - log_probabilities)).sum(-1).mean()

    loss = divergence(student.log_probabilities(visual, grid, False, answer))
    if not thinking:
        return loss, loss.new_zeros(())
    thoughts = [student.encode(thought(one.remark, score)) for one, score in zip(chosen, scores, strict=True)]
    longest = max(map(len, thoughts)) + answer.shape[1]
    # Shorter replies are padded behind their end, where nothing that counts can see it.
    replies = [said + end for said, end in zip(thoughts, answers, strict=True)]
    tail = torch.tensor([row + [0] * (longest - len(row)) for row in replies])
    log_probabilities = student.log_probabilities(visual, grid, True, tail)
    spans = [(len(said), len(said) + answer.shape[1]) for said in thoughts]
    loss = loss + divergence(torch.stack([log_probabilities[i, start:end] for i, (start, end) in enumerate(spans)]))
    first = 0 if taught else torch.tensor([len(student.encode(_up_to_level(one.remark))) for one in chosen])[:, None]
    places = torch.arange(longest)[None]
    reasoning = (places >= first) & (places < torch.tensor([len(said) for said in thoughts])[:, None])
    told = F.nll_loss(log_probabilities[reasoning], tail[reasoning])
    if taught and hint is not None:
        names = torch.tensor([REMARKED.index(one.remark.split(" ", 1)[1]) for one in chosen])
        pooled = torch.cat([visual.mean(1), visual.std(1)], dim=-1).float()
        told = told + 0.2 * F.cross_entropy(hint(pooled), names)
    return loss, told


def _up_to_level(said: str) -> str:
    return thought(said, 1.0).split(" The overall")[0]


def train(options: argparse.Namespace) -> Path:
    """Run both stages and write the model."""
    spec = ModelSpec(options.model, dtype="float32", device="cpu")
    loaded = load_model(spec)
    model = loaded.model.requires_grad_(False).eval()
    teacher = TokenReader(replace(loaded, model=copy.deepcopy(model)))
    began = time.monotonic()
    named, rated = _seen(options, loaded, teacher)
    print(f"{len(named)} named and {len(rated)} rated pictures seen in {time.monotonic() - began:.0f}s", flush=True)

    torch.manual_seed(options.seed)
    rng = np.random.default_rng([options.seed, 1])  # what is drawn from now on is the same with and without a cache
    student = TokenReader(loaded)
    hint = torch.nn.Linear(2 * model.config.get_text_config().hidden_size, len(REMARKED))
    trained = torch.nn.ModuleList([model.model.language_model, model.model.visual.merger, hint]).requires_grad_(True)
    weights = [*trained.parameters()]
    optimizer = torch.optim.AdamW(weights, options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps, pct_start=0.1)
    second, began, sums = round(0.7 * options.steps), time.monotonic(), np.zeros(3)
    for step in range(1, options.steps + 1):
        if step == second:
            name_rated(student, rated)
        batches = batch_of(named, options.batch, rng), batch_of(rated, options.batch // 2, rng)
        with torch.autocast("cpu", torch.bfloat16):
            answer, reasoning = losses(student, teacher, *batches[0], thinking=True, taught=True, hint=hint)
            rated_answer, level = losses(student, teacher, *batches[1], thinking=step >= second, taught=False)
        optimizer.zero_grad()
        (options.answer_weight * (answer + rated_answer) + reasoning + 0.2 * level).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        sums += [float(value.detach()) for value in (answer, rated_answer, reasoning)]
        if step % options.every == 0:
            answer, rated_answer, reasoning = sums / options.every
            told = f"answers {answer:.4f} of rated pictures {rated_answer:.4f} reasoning {reasoning:.4f}"
            print(f"step {step} {(time.monotonic() - began) / step:.2f}s {told}", flush=True)
            sums[:] = 0
    return save(spec, model, Path(options.output))


def _seen(options, loaded, teacher) -> tuple[list[Shown], list[Shown]]:
    """All pictures, from the file of an earlier run with the same model if there is one."""
    cache = Path(options.cache) if options.cache else None
    if cache and cache.is_file():
        named, rated = torch.load(cache, weights_only=True)
        return [Shown(**row) for row in named], [Shown(**row) for row in rated]
    named, rated = (see(loaded, part, teacher) for part in collect(options, np.random.default_rng(options.seed)))
    if cache:
        torch.save(([vars(one) for one in named], [vars(one) for one in rated]), cache)
    return named, rated


def name_rated(student: TokenReader, rated: Sequence[Shown]) -> None:
    """Give rated pictures the remarks that the model makes of them now."""
    for grid in sorted({one.grid for one in rated}):
        group = [one for one in rated if one.grid == grid]
        for i in range(0, len(group), 32):
            with torch.no_grad():
                visual = student.merge(torch.stack([one.tokens for one in group[i : i + 32]]).float())
            said = student.continue_text(visual, grid, "<think> The picture shows", ".", 6)
            for one, text in zip(group[i : i + 32], said, strict=True):
                one.remark = text
    said = Counter(one.remark for one in rated).most_common(8)
    print("rated pictures show: " + ", ".join(f"{text} {count}" for text, count in said), flush=True)


def save(spec: ModelSpec, model: torch.nn.Module, output: Path) -> Path:
    """Write the model in the precision of the one it was made from, with that one's other files."""
    weights = sorted(spec.folder.glob("*.safetensors"))
    with safe_open(weights[0], "pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    model.to(dtype).save_pretrained(output)
    for file in spec.folder.iterdir():
        if file.suffix in (".json", ".jinja") and not (output / file.name).exists():
            shutil.copy(file, output / file.name)
    return output


def main(arguments: Sequence[str] | None = None) -> Path:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.reasoning", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", help="folder of the model to start from, or nano")
    parser.add_argument("--pristine", required=True, help="folder of undistorted pictures")
    parser.add_argument("--data", required=True, help="ratings, in any format of `vqr1 train`")
    parser.add_argument("--images", required=True, help="folder of the rated pictures")
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument("--best", type=int, default=120, help="best-rated pictures that count as undistorted")
    parser.add_argument("--versions", type=int, default=12, help="versions of each undistorted picture")
    parser.add_argument("--rated", type=int, default=400, help="rated pictures whose answers are kept")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--answer-weight", type=float, default=1.0)
    parser.add_argument("--every", type=int, default=25, help="steps between two report lines")
    parser.add_argument("--cache", help="file that keeps the visual tokens for the next run with the same model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = train(options)
    print(f"the model is in {folder}")
    return folder


if __name__ == "__main__":
    main()
