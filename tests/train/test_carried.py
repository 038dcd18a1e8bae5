"""State carried over long documents: the loss is that of the whole text, gradients end at block edges."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spikelm import state as states
from spikelm.data import TokenBlocks
from spikelm.data.lanes import Lanes
from spikelm.errors import CheckpointError, ConfigError
from spikelm.loss import next_token_loss
from spikelm.recurrence import Context
from spikelm.tokenizer import Tokenizer
from spikelm.train.backend_torch import TorchBackend
from spikelm.train.config import TrainConfig
from spikelm.train.setup import build_model
from spikelm.train.step import StepRunner
from spikelm.train.trainer import Trainer

BYTES = Tokenizer.bytes()
TEXT = "".join(chr(97 + (7 * i * i + i // 5) % 26) for i in range(16 * 24 + 1))
MODELS = {"twin": {"name": "none"}, "spiking": {"name": "adaptive", "k": 3.0, "dead_zone": 1.0}}
T = 16


def lanes(texts: list[str], count: int) -> Lanes:
    return Lanes(TokenBlocks.from_documents(texts, BYTES, T).store, BYTES, T, count)


def runner(make_values: Any, samples: Lanes, neuron: str, **changes: Any) -> StepRunner:
    """Steps in float64 that change no weight: the learning rate is far below rounding."""
    values = make_values(
        batch_size=samples.num_lanes,
        model__neuron=MODELS[neuron],
        model__dropout=0.0,
        optim__lr=1e-60,
        optim__min_lr=0.0,
        optim__weight_decay=0.0,
        schedule__warmup=0,
        data__prefetch=0,
        **changes,
    )
    config = TrainConfig.from_dict(values)
    model = build_model(config, BYTES).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # the head starts at zero, where every loss is the same
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return StepRunner(config, TorchBackend(model, config, torch.device("cpu")), samples)


def model_of(steps: StepRunner) -> Any:
    return steps._backend.model


def assert_same(a: Path, b: Path, step: int = 12) -> None:
    """Model, optimiser, lanes, progress and logged losses of two runs are equal, bit for bit."""
    folders = [out / "checkpoints" / f"step-{step:08d}" for out in (a, b)]
    for name in ("model.safetensors", "training.safetensors"):
        left, right = (load_file(folder / name) for folder in folders)
        assert left.keys() == right.keys() and left
        for key, value in left.items():
            assert torch.equal(value, right[key]), f"{name}: {key}"
    records = [json.loads((folder / "training.json").read_text())["progress"] for folder in folders]
    left, right = ({k: v for k, v in record.items() if k != "seconds"} for record in records)
    assert left == right
    lines = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    losses = [[(x["step"], x["loss"]) for x in found if x["event"] == "step"] for found in lines]
    assert losses[0] == losses[1] and losses[0]


# --- what a step computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("neuron", MODELS)
def test_blocks_of_a_long_document_lose_what_the_whole_document_loses(make_values: Any, neuron: str) -> None:
    steps = runner(make_values, lanes([TEXT], 1), neuron)
    model = model_of(steps)
    model.train()
    nats = [steps.take(step, step, None).nats for step in range(24)]
    ids = torch.tensor(BYTES.encode(TEXT))[None]
    reset = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool)
    with torch.no_grad():
        whole = [
            float(
                next_token_loss(
                    model,
                    ids[:, : (step + 1) * T],
                    _only(ids[:, 1 : (step + 1) * T + 1], step),
                    ctx=Context(reset=reset[:, : (step + 1) * T]),
                ).nats
            )
            for step in range(24)
        ]
        alone = float(next_token_loss(model, ids[:, T : 2 * T], ids[:, T + 1 : 2 * T + 1]).nats)
    assert nats == pytest.approx(whole, rel=0, abs=1e-10)
    assert abs(alone - whole[1]) > 1e-3  # the state that was carried does matter


def _only(targets: torch.Tensor, step: int) -> torch.Tensor:
    """Targets of block ``step`` alone."""
    found = torch.full_like(targets, -100)
    found[:, step * T :] = targets[:, step * T :]
    return found


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_end_at_block_edges(make_values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = runner(make_values, lanes([TEXT], 1), "twin", optim__clip=0.0)
    model, backend = model_of(steps), steps._backend
    model.train()
    seen: list[dict[str, torch.Tensor]] = []
    original = backend.step
    monkeypatch.setattr(backend, "step", lambda f: (seen.append(gradients(model)), original(f))[1])
    for step in range(2):
        steps.take(step, step, None)
    ids = torch.tensor(BYTES.encode(TEXT))[None]
    found = []
    for cut in (True, False):
        backend.clear_gradients()
        first = next_token_loss(model, ids[:, :T], ids[:, 1 : T + 1])
        before = states.detach(first.state) if cut else first.state
        next_token_loss(model, ids[:, T : 2 * T], ids[:, T + 1 : 2 * T + 1], before).loss.backward()
        found.append(gradients(model))
    for name, value in seen[1].items():
        assert torch.allclose(value, found[0][name], rtol=1e-9, atol=1e-12), name
    assert any(not torch.allclose(found[1][n], v, rtol=1e-3, atol=1e-9) for n, v in seen[1].items())


@pytest.mark.parametrize("neuron", MODELS)
def test_lanes_are_independent(make_values: Any, neuron: str) -> None:
    """Each lane ends in the state that its own text alone leaves, in whatever micro-batches."""
    samples = lanes([TEXT], 3)
    ends = []
    for parts in (1, 2, 3):
        steps = runner(make_values, samples, neuron, accumulation=parts)
        model_of(steps).train()
        for step in range(samples.steps):
            steps.take(3 * step, step, None)
        ends.append(steps.lane_tensors())
        assert len({key.split("/")[1] for key in ends[-1]}) == parts
    batch = samples.batch(0, 0, 3 * samples.steps)
    for lane in range(3):
        text = batch.inputs[lane::3].reshape(1, -1)
        with torch.no_grad():
            alone = states.flatten(next_token_loss(model_of(steps), text, text).state)
        for end in ends:
            names = sorted({key.split("/", 2)[2] for key in end})
            for name in names:
                rows = torch.cat([end[k] for k in sorted(end) if k.endswith(f"/{name}")])
                assert torch.allclose(rows[lane], alone[name][0], rtol=0, atol=1e-10), name
        assert set(names) == set(alone)


def test_short_documents_reset_the_state(make_values: Any) -> None:
    """Where documents are packed, a lane computes what packed blocks of the same text compute."""
    texts = [chr(97 + i) * (1 + 5 * i % 13) for i in range(26)]
    samples = lanes(texts, 1)
    steps = runner(make_values, samples, "spiking")
    model_of(steps).train()
    for step in range(samples.steps):
        batch = samples.batch(0, step, 1)
        nats = steps.take(step, step, None).nats
        # The same documents, each forward alone: the first of the block goes on from the block before.
        expected, row = 0.0, batch.inputs[0]
        begins = [*torch.flatten(batch.reset[0].nonzero()).tolist(), T]
        with torch.no_grad():
            for begin, end in zip(begins, begins[1:], strict=False):
                piece, targets = row[None, begin:end], batch.targets[:1, begin:end]
                if (targets != -100).any():
                    expected += float(next_token_loss(model_of(steps), piece, targets).nats)
            if begins[0]:
                history = torch.cat([samples.batch(0, s, 1).inputs[0] for s in range(step + 1)])
                marks = torch.cat([samples.batch(0, s, 1).reset[0] for s in range(step + 1)])
                start = int(marks[: step * T].nonzero()[-1])
                piece = history[None, start : step * T + begins[0]]
                targets = torch.full_like(piece, -100)
                targets[0, -begins[0] :] = batch.targets[0, : begins[0]]
                expected += float(next_token_loss(model_of(steps), piece, targets).nats)
        assert nats == pytest.approx(expected, rel=0, abs=1e-10)


def test_lanes_are_restored_in_other_pieces(make_values: Any) -> None:
    samples = lanes([TEXT], 4)
    one = runner(make_values, samples, "spiking")
    model_of(one).train()
    for step in range(3):
        one.take(4 * step, step, None)
    for parts in (2, 3, 4):
        other = runner(make_values, samples, "spiking", accumulation=parts)
        model_of(other).train()
        other.restore_lanes(one.lane_tensors())
        expected = runner(make_values, samples, "spiking")
        model_of(expected).train()
        expected.restore_lanes(one.lane_tensors())
        assert other.take(12, 3, None).nats == pytest.approx(expected.take(12, 3, None).nats, abs=1e-10)


# --- runs -------------------------------------------------------------------------------------------------


def values(make_values: Any, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Twelve steps of four lanes: more than one epoch, of a long document and some short ones."""
    texts = [TEXT, *("spike " * (1 + i) for i in range(9))]
    path = tmp_path / "long.jsonl"
    if not path.exists():  # a stream knows a file by its date
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return dict(make_values(data__train=str(tmp_path / "long.jsonl"), data__carried=True, **changes))


def kinds(make_values: Any, tmp_path: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """A configuration of each kind of data."""
    made = values(make_values, tmp_path, **changes)
    if kind == "carried":
        return made
    made["data"]["carried"] = False
    made["data"].update(
        {"stream": kind != "mixture", "shuffle_buffer": 9 if kind == "shuffled stream" else 0}
    )
    if "mixture" in kind:
        parts = [(made["data"]["train"], 0.6), (str(tmp_path / "valid.txt"), 0.4)]
        made["data"]["train"] = [{"source": source, "weight": weight} for source, weight in parts]
    return made


KINDS = ["carried", "mixture", "stream", "shuffled stream", "mixture of streams"]


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_bit_equal(
    make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stopped inside documents, an epoch and a shuffled window; lanes and position are saved."""
    whole = Trainer(TrainConfig.from_dict(kinds(make_values, tmp_path, kind, out=str(tmp_path / "whole"))))
    whole.run()
    original = Trainer._train_step
    for at in (5, 8):

        def step(self: Trainer, bar: Any, at: int = at) -> None:
            original(self, bar)
            if self._state.step == at:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Trainer, "_train_step", step)
        assert Trainer(TrainConfig.from_dict(kinds(make_values, tmp_path, kind))).run().step == at
    monkeypatch.setattr(Trainer, "_train_step", original)
    resumed = Trainer(TrainConfig.from_dict(kinds(make_values, tmp_path, kind)))
    assert resumed.run().resumed_from == 8
    assert_same(tmp_path / "whole", tmp_path / "run")
    used = whole.log.read("data")[-1]
    assert used["step"] == 12 and used["epochs"] == resumed.log.read("data")[-1]["epochs"]
    assert len(used["epochs"]) == (
        2 if kind == "mixture" else 1 if kind == "carried" else len(used["epochs"])
    )
    assert kind != "carried" or sum(used["epochs"].values()) > 1.0
    header = whole.log.read("run")[0]["data"]["train"]
    assert header["kind"] == ("lanes" if kind == "carried" else kind.split()[0 if "mix" in kind else -1])


@pytest.mark.slow
def test_killed_process_goes_on_with_its_lanes(make_values: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch of carried lanes, in a real process."""
    made = values(make_values, tmp_path, steps=40, checkpoint_every=1, eval_every=40, schedule__warmup=0)
    Trainer(TrainConfig.from_dict({**made, "out": str(tmp_path / "whole")})).run()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(made))
    process = subprocess.Popen(
        [sys.executable, "-m", "spikelm", "train", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    latest = tmp_path / "run" / "latest"
    while process.poll() is None and not (latest.is_symlink() and int(os.readlink(latest)[-2:]) >= 3):
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    result = Trainer(TrainConfig.from_dict(made)).run()
    assert result.resumed_from is not None and 3 <= result.resumed_from < 40
    assert_same(tmp_path / "whole", tmp_path / "run", step=40)


def test_accumulation_may_change_and_batch_size_may_not(make_values: Any, tmp_path: Path) -> None:
    Trainer(TrainConfig.from_dict(values(make_values, tmp_path, steps=5, schedule__warmup=0))).run()
    changed = {"accumulation": 3, "steps": 6, "schedule__warmup": 0}
    assert Trainer(TrainConfig.from_dict(values(make_values, tmp_path, **changed))).run().step == 6
    with pytest.raises(CheckpointError) as caught:
        Trainer(TrainConfig.from_dict(values(make_values, tmp_path, batch_size=2))).run()
    message = str(caught.value)
    assert "batch_size is 4 in the checkpoint and 2 now, and every lane of a carried run" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__carried": False}, "data.carried is True in the checkpoint and None now"),
        ({"data__carried": False, "data__stream": True}, "data.carried is True"),
    ],
)
def test_other_data_is_another_run(
    make_values: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    made = values(make_values, tmp_path, steps=2, schedule__warmup=0)
    Trainer(TrainConfig.from_dict(made)).run()
    for key, value in changes.items():
        made["data"][key.removeprefix("data__")] = value
    with pytest.raises(CheckpointError, match=words):
        Trainer(TrainConfig.from_dict(made)).run()


def test_bad_combinations(make_values: Any, tmp_path: Path) -> None:
    for changes, words in (
        ({"data__stream": True}, "data: carried needs one tokenised source, not stream: true"),
        ({"data__train": [{"source": "a"}]}, "data: carried needs one tokenised source, not a mixture"),
        ({"data__shuffle_buffer": 3}, "data: shuffle_buffer is for stream: true"),
    ):
        with pytest.raises(ConfigError, match=words):
            TrainConfig.from_dict(make_values(**{"data__carried": True, **changes}))
