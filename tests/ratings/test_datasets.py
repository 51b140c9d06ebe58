"""Each data set in the layout of its owners, small."""

import math
from pathlib import Path

import pytest
from evaluation_files import save_picture, write_xlsx

from vqr1_metric.evaluation.published import PUBLISHED, SETS, published_rows
from vqr1_metric.ratings import RatingError, RatingSet
from vqr1_metric.ratings.datasets import DATASETS, find_folder, get_dataset, suite


def load(name: str, root: Path, split: str | None = None) -> RatingSet:
    dataset = get_dataset(name)
    return dataset.load(find_folder(dataset, root), split)


def summary(labels: RatingSet) -> list[tuple]:
    """What is known of each row, its picture by file name."""
    rows = []
    for item in labels.images:
        std = None if math.isnan(item.std) else item.std
        rows.append((item.path.name, item.mos, std, item.scene, item.method, item.split))
    return rows


def test_koniq(tmp_path: Path) -> None:
    folder = tmp_path / "KonIQ-10k"
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        save_picture(folder / "1024x768" / name, 0.5)
        save_picture(folder / "512x384" / name, 0.5)
    (folder / "koniq10k_distributions_sets.csv").write_text(
        "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set\n1.jpg,0,0,0.2,0.7,0.1,105,77.38,0.5,training\n"
        "2.jpg,0,0,0.4,0.5,0.1,96,68.7,0.6,test\n3.jpg,0,0,0.4,0.5,0.1,96,60.5,0.6,validation\n"
    )
    assert summary(load("koniq", tmp_path)) == [("2.jpg", 68.7, None, None, None, "test")]
    everything = load("koniq", tmp_path, "all")
    assert len(everything) == 3 and everything.expected == 10073
    assert {item.path.parent.name for item in everything.images} == {"1024x768"}
    (folder / "koniq10k_distributions_sets.csv").unlink()
    (folder / "koniq10k_scores_and_distributions.csv").write_text(
        '"image_name","c1","c2","c3","c4","c5","c_total","MOS","SD","MOS_zscore"\n"1.jpg",0,0,25,73,7,105,3.83,0.5,77.38\n'
    )
    assert summary(load("koniq", tmp_path)) == [("1.jpg", 77.38, None, None, None, None)]  # no official split in it
    with pytest.raises(RatingError, match="Expected a split of"):
        load("koniq", tmp_path, "test")


def test_spaq(tmp_path: Path) -> None:
    save_picture(tmp_path / "SPAQ" / "TestImage" / "00001.jpg", 0.5)
    (tmp_path / "SPAQ" / "Annotations").mkdir()
    rows = [["Image name", "MOS", "Brightness"], ["00001.jpg", 58.25, 60.0], ["00002.jpg", 30.0, 61.0]]
    write_xlsx(tmp_path / "SPAQ" / "Annotations" / "MOS and Image attribute scores.xlsx", rows)
    labels = load("spaq", tmp_path)
    assert summary(labels) == [("00001.jpg", 58.25, None, None, None, None)] and labels.short_edge == 768
    assert [(problem.kind, problem.subject) for problem in labels.problems] == [("missing picture", "00002.jpg")]


def test_kadid(tmp_path: Path) -> None:
    for name in ("I01.png", "I01_01_01.png", "I01_09_05.png"):
        save_picture(tmp_path / "kadid10k" / "images" / name, 0.5)
    (tmp_path / "kadid10k" / "dmos.csv").write_text(
        "dist_img,ref_img,dmos,var\nI01_01_01.png,I01.png,4.57,0.496\nI01_09_05.png,I01.png,1.2,0.4\n"
    )
    labels = load("kadid10k", tmp_path)
    assert summary(labels) == [
        ("I01_01_01.png", 4.57, 0.496, "I01.png", "01", None),
        ("I01_09_05.png", 1.2, 0.4, "I01.png", "09", None),
    ]
    assert not labels.lower_is_better and labels.has_scenes


def test_agiqa(tmp_path: Path) -> None:
    names = ["AttnGAN_normal_000.jpg", "sd1.5_low_001.jpg", "xl2.2_normal_275.jpg"]
    for name in names:
        save_picture(tmp_path / "AGIQA-3K" / name, 0.5)
    # Prompts hold commas, each another number of them.
    (tmp_path / "AGIQA-3K" / "data.csv").write_text(
        "name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align\n"
        'AttnGAN_normal_000.jpg,"a man, old",,,,0.9656,0.2233,0.4089,0.6156\nsd1.5_low_001.jpg,x,,,,2.5,0.1,1,1\n'
        'xl2.2_normal_275.jpg,"a dog, cold color, HDR, anime style",cold color,HDR,anime style,3.61,0.53,3.39,0.39\n'
    )
    assert summary(load("agiqa3k", tmp_path)) == [
        ("AttnGAN_normal_000.jpg", 0.9656, 0.2233, None, "AttnGAN", None),
        ("sd1.5_low_001.jpg", 2.5, 0.1, None, "sd1.5", None),
        ("xl2.2_normal_275.jpg", 3.61, 0.53, None, "xl2.2", None),
    ]


def test_tid(tmp_path: Path) -> None:
    folder = tmp_path / "tid2013"
    save_picture(folder / "distorted_images" / "I01_01_1.bmp", 0.5)
    save_picture(folder / "distorted_images" / "i02_07_4.BMP", 0.5)
    (folder / "mos_with_names.txt").write_text("5.51429 I01_01_1.bmp\n5.56757 i02_07_4.bmp\n")
    (folder / "mos_std.txt").write_text("0.13\n0.17\n")
    assert summary(load("tid2013", tmp_path)) == [
        ("I01_01_1.bmp", 5.51429, 0.13, "I01", "01", None),
        ("i02_07_4.BMP", 5.56757, 0.17, "I02", "07", None),
    ]
    (folder / "mos_std.txt").write_text("0.13\n")
    with pytest.raises(RatingError, match="Expected as many rows"):
        load("tid2013", tmp_path)


def test_biq2021(tmp_path: Path) -> None:
    for name in ("ss01 (10).jpg", "ss03 (7805).jpg"):
        save_picture(tmp_path / "BIQ2021" / "Images" / name, 0.5)
    (tmp_path / "BIQ2021" / "Train.csv").write_text("Image Name,MOS\nss01 (10).jpg,0.47013\n")
    (tmp_path / "BIQ2021" / "Test.csv").write_text("Image Name,MOS\nss03 (7805).jpg,0.70609\n")
    (tmp_path / "BIQ2021" / "Test (Images and MOS).csv").write_text("Image Name,MOS\nss03 (7805).jpg,0.7321\n")
    assert summary(load("biq2021", tmp_path)) == [("ss03 (7805).jpg", 0.70609, None, None, None, "test")]
    assert len(load("biq2021", tmp_path, "all")) == 2 and not load("biq2021", tmp_path, "all").problems


@pytest.mark.parametrize("name", ["bid", "clive", "liu13", "sriqa", "min19", "koniq", "kadid10k", "tid2013"])
def test_every_set_by_the_authors_label_file(tmp_path: Path, name: str) -> None:
    dataset = get_dataset(name)
    folder = tmp_path / dataset.folders[-1].upper()
    save_picture(folder / "a.png", 0.5)
    (folder / "labels.txt").write_text("ref.png a.png 3.5 0.5\n")
    labels = load(name, tmp_path)
    assert summary(labels) == [("a.png", 3.5, 0.5, "ref.png", None, None)] and labels.name == dataset.title
    (folder / "more.txt").write_text("a.png 3.5\n")
    with pytest.raises(RatingError, match=r"Expected one label file .* found labels.txt, more.txt: name one"):
        load(name, tmp_path)


def test_a_folder_without_the_set_says_so(tmp_path: Path) -> None:
    (tmp_path / "koniq10k").mkdir()
    with pytest.raises(RatingError, match=r"Expected a label file in .* get it from https://database\.mmsp-kn\.de"):
        load("koniq", tmp_path)
    assert find_folder(get_dataset("spaq"), tmp_path) is None
    (tmp_path / "koniq10k" / "koniq10k_distributions_sets.csv").write_text("name,score\na,1\n")
    with pytest.raises(RatingError, match="Expected a column 'image_name' for image"):
        load("koniq", tmp_path)


def test_registry() -> None:
    assert {dataset.title for dataset in suite("paper")} >= {*SETS, "KADID-10k"}
    for name, dataset in DATASETS.items():
        assert name == dataset.name and dataset.where and dataset.licence and dataset.layout and dataset.folders
    folders = [folder for dataset in DATASETS.values() for folder in dataset.folders]
    assert len(folders) == len(set(folders))


def test_published_rows_average_to_the_published_means() -> None:
    # the column "mean" of the same table
    means = {
        "NIQE": (0.482, 0.519),
        "BRISQUE": (0.431, 0.482),
        "MUSIQ": (0.477, 0.450),
        "LIQE": (0.717, 0.709),
        "Q-Align": (0.632, 0.679),
        "DeQA-Score": (0.731, 0.772),
        "Qwen2.5-VL-7B": (0.708, 0.752),
        "Q-Insight": (0.766, 0.803),
        "VisualQuality-R1": (0.777, 0.814),
        "VisualQuality-R1 (KADID + SPAQ)": (0.791, 0.831),
    }
    assert list(means) == list(PUBLISHED)
    for name, mean in means.items():
        for i in range(2):
            assert sum(pair[i] for pair in PUBLISHED[name].values()) / len(SETS) == pytest.approx(mean[i], abs=0.0016)
    assert published_rows("KonIQ")[8] == ("VisualQuality-R1", 0.83, 0.84) and published_rows("mine") == []
