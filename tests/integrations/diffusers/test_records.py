"""Runs on disk, runs that go on where they were stopped, and samplers that are plain functions."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers_matrix import difference
from PIL import Image
from stub_scorer import formula_scorer
from tiny_pipelines import build, failing

from vqr1_metric import cli
from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError
from vqr1_metric.integrations.diffusers.generate import generate

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def paint(seed, prompt=None, shade=1.0):
    """A picture of a seed, without any pipeline."""
    values = np.random.default_rng(seed).integers(1, 256, (24, 32, 3)) * shade
    return Image.fromarray(values.astype(np.uint8))


def test_a_saved_run_says_how_it_was_made(sd, tmp_path):
    def red(pictures, prompt):
        return [float(np.asarray(picture)[..., 0].mean()) for picture in pictures]

    best = BestOfN(sd.pipe, formula_scorer(), also={"red": (red, 0.001)})
    out = best(n=5, keep=2, preview_at_ratio=0.4, survivors=3, seed=40, **sd.arguments | {"prompt": "a café"})
    assert out.save(tmp_path / "run") == tmp_path / "run"
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    kept = [f"{i:02d}_seed{seed}.png" for i, seed in enumerate(out.seeds)]
    assert names == sorted([*kept, "contact.png", "results.jsonl", "run.json"])
    for i, name in enumerate(kept):
        with Image.open(tmp_path / "run" / name) as image:
            assert difference(image, out.images[i]) == 0
            assert (image.text["prompt"], int(image.text["seed"])) == ("a café", out.seeds[i])
            assert float(image.text["score"]) == out.scores[i]
            facts = json.loads(image.text["vqr1"])
        assert facts["scheduler"] == "DDIMScheduler"
        assert facts["pipe"] == "StableDiffusionPipeline"
        assert set(facts["versions"]) == {"vqr1_metric", "torch"}
        assert facts["diffusers"]
        assert facts["arguments"]["num_inference_steps"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text("utf-8").splitlines()]
    assert [line["seed"] for line in lines] == [40, 41, 42, 43, 44]
    for line, record in zip(lines, out.records, strict=True):
        assert (line["score"] is None) == math.isnan(record.score)
        assert line["preview_score"] == record.preview_score
        assert (line.get("file") in kept) == (record.seed in out.seeds)
    assert set(lines[out.records.index(next(r for r in out.records if r.survived))]["also"]) == {"red"}
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (run["strategy"], run["denoiser_rows"], run["interrupted"]) == ("inplace", out.denoiser_rows, None)
    with Image.open(tmp_path / "run" / "contact.png") as sheet:
        assert sheet.size == out.grid().size


def test_a_video_is_saved_as_its_frames(tmp_path):
    tiny = build("wan")
    best = BestOfN(tiny.pipe, formula_scorer())
    out = best(n=2, output_type="pil", folder=tmp_path, **tiny.arguments)
    out.save(tmp_path)
    frames = sorted((tmp_path / f"00_seed{out.seeds[0]}").iterdir())
    assert len(frames) == len(out.images[0]) == 5
    tiny.pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("denoised"))
    again = best(n=2, output_type="pil", folder=tmp_path, **tiny.arguments)
    assert again.scores == out.scores


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_run_goes_on_where_it_was_stopped(sd, tmp_path, output_type):
    best = BestOfN(sd.pipe, formula_scorer(), batch_size=2)
    arguments = sd.arguments | {"output_type": output_type}
    whole = best(n=6, keep=6, **arguments)
    with failing(sd.pipe.unet, 2 * 6 + 3):
        stopped = best(n=6, keep=6, folder=tmp_path, **arguments)
    assert len(stopped.images) == 4
    calls = []
    hook = sd.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    again = best(n=6, keep=6, folder=tmp_path, **arguments)
    assert len(calls) == 6  # one call of the pipe, for the last two
    assert again.denoiser_rows == 2 * 2 * 6
    assert (again.seeds, type(again.images[0])) == (whole.seeds, type(whole.images[0]))
    assert again.scores == pytest.approx(whole.scores)
    more = best(n=8, keep=8, folder=tmp_path, **arguments)
    hook.remove()
    assert len(calls) == 12
    assert len(more.images) == 8
    for other in ({"guidance_scale": 2.0}, {"prompt": "another"}, {"num_inference_steps": 7}):
        with pytest.raises(ValueError, match="made with other settings"):
            best(n=6, folder=tmp_path, **arguments | other)


def test_a_function_of_a_seed():
    seen = []

    def sample(seed, prompt=None, shade=1.0):
        seen.append((seed, prompt))
        return paint(seed, prompt, shade)

    best = BestOfN.from_function(sample, formula_scorer())
    out = best("a cat", n=5, keep=2, seed=3, shade=0.5)
    assert seen == [(seed, "a cat") for seed in range(3, 8)]
    assert (out.strategy, out.denoiser_rows, len(out.images)) == ("function", 0, 2)
    expected = [formula_scorer().score(paint(seed, shade=0.5))[0].score for seed in range(3, 8)]
    assert [record.score for record in out.records] == expected
    assert out.scores == sorted(expected, reverse=True)[:2]
    assert [len(o.images) for o in best(["a", "b"], n=2)] == [1, 1]
    assert seen[-1] == (1, "b")
    best(n=1)  # no prompt


def test_a_function_of_a_list_of_seeds_resumes(tmp_path):
    calls = []

    def sample(seeds, prompt):
        calls.append(list(seeds))
        if len(calls) == 3:
            raise ConnectionError("the server is gone")
        return [paint(seed) for seed in seeds]

    best = BestOfN.from_function(sample, formula_scorer(), batch_size=3)
    out = best("a", n=8, keep=8, folder=tmp_path)
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert isinstance(out.error, ConnectionError)
    assert len(out.images) == 6
    again = best("a", n=8, keep=8, folder=tmp_path)
    assert calls[3:] == [[6, 7]]
    assert (again.interrupted, len(again.images)) == (None, 8)


def test_what_a_function_cannot_do():
    best = BestOfN.from_function(paint, formula_scorer())
    with pytest.raises(UnsupportedError, match="Expected a pipe for previews"):
        best(n=2, preview_at_ratio=0.5)
    with pytest.raises(UnsupportedError, match="Expected a pipe for search"):
        best.search(budget=10)
    with pytest.raises(UnsupportedError, match="Expected a pipe for particles"):
        best.particles()
    with pytest.raises(TypeError, match="a function of a seed"):
        BestOfN.from_function(3, formula_scorer())
    with pytest.raises(UnsupportedError, match="Expected 2 pictures from <lambda>, but got 1"):
        BestOfN.from_function(lambda seeds: [paint(0)], formula_scorer(), batch_size=2)(n=2)


def test_two_pipes_in_a_row(sd):
    """A base and a refiner, each candidate's seed for both."""
    refiner = build("img2img")

    def sample(seed, prompt):
        base = sd.pipe(**sd.arguments | {"prompt": prompt}, generator=torch.Generator().manual_seed(seed)).images[0]
        arguments = refiner.arguments | {"prompt": prompt, "image": base}
        return refiner.pipe(**arguments, generator=torch.Generator().manual_seed(seed)).images[0]

    out = BestOfN.from_function(sample, formula_scorer())("a", n=3)
    assert difference(out.images[0], sample(out.seeds[0], "a")) == 0


def test_generate_makes_every_prompt_once(tmp_path):
    seen = []

    def sample(seed, prompt, shade=1.0):
        seen.append((prompt, seed))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return paint(seed + len(prompt), prompt, shade)

    best = BestOfN.from_function(sample, formula_scorer())
    prompts = ["a", "bb", "ccc"]
    first = list(generate(best, prompts, tmp_path, n=4, keep=2))
    assert [(prompt, output.interrupted) for prompt, _, output in first] == [("a", None), ("bb", "KeyboardInterrupt")]
    assert len(first[1][2].images) == 1
    second = list(generate(best, prompts, tmp_path, n=4, keep=2))
    assert second[0][2] is None
    assert seen == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("bb", 0), ("bb", 1), ("bb", 1), ("bb", 2), ("bb", 3),
                    ("ccc", 0), ("ccc", 1), ("ccc", 2), ("ccc", 3)]  # fmt: skip
    assert all(len(list((tmp_path / f"{i:04d}").glob("*_seed*.png"))) == 2 for i in range(3))
    assert [output for *_, output in generate(best, prompts, tmp_path, n=4, keep=2)] == [None] * 3
    with pytest.raises(ValueError, match="made with other settings"):
        list(generate(best, ["other", *prompts], tmp_path, n=4, keep=2))


def test_vqr1_generate(sd, tmp_path, capsys, tiny_qwen2_5_vl):
    sd.pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a lighthouse\n\n a café \n", encoding="utf-8")
    command = ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--pipe", str(tmp_path / "pipe"), "--n", "3",
               "--keep", "2", "--steps", "4", "--size", "32", "32", "--preview-at", "0.3", "--survivors", "0.7",
               "--model", str(tiny_qwen2_5_vl), "--device", "cpu", "-o", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[1].endswith("a café")
    line = json.loads((tmp_path / "out" / "0001" / "results.jsonl").read_text("utf-8").splitlines()[0])
    assert line["prompt"] == "a café"
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("done before") == 2
    (tmp_path / "prompts.txt").write_text("", encoding="utf-8")
    assert cli.main(command) == 1
    assert "holds no prompt" in capsys.readouterr().err
