"""What a process of a training run really holds, kind by kind: the bytes of the storages that are there."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.schema import load
from kinoflow.dit_video.parallel import parallelize
from kinoflow.dit_video.video_dit import VideoDiT
from kinoflow.train.plan.config import PlanConfig
from kinoflow.train.run import engine
from kinoflow.train.run.ema import EMA
from kinoflow.train.run.spread import Spread
from kinoflow.train.run.task import Loss

TEXT_TOKENS = (10, 2, 5)
LATENT = (4, 8, 8)


def storage_bytes(tensors):
    """Every storage counts once, however many views of it there are."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def shared(one, other):
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class Saved:
    """A context that counts what is kept for the backward pass, weights left out."""

    def __init__(self, model):
        self.model = model
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if all(storage._cdata != p.untyped_storage()._cdata for p in self.model.parameters()):
            self.storages[storage._cdata] = storage  # held, so that no later one takes its address
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def batch(config, clips):
    latent = torch.randn(clips, config.dit.latent_channels, *LATENT)
    text = [TextEmbedding(hidden=torch.randn(clips, tokens, width), mask=torch.ones(clips, tokens).bool())
            for tokens, width in zip(TEXT_TOKENS, config.dit.text_widths, strict=True)]  # fmt: skip
    return latent, torch.rand(clips), text


def loss(model, inputs, step):
    latent, time, text = inputs
    return Loss(total=torch.nn.functional.mse_loss(model(latent, time, text), torch.randn_like(latent)))


def held(cases, folder):
    """Two optimizer steps under each of the cases; FOLDER/CASE.RANK.json has the bytes in the second."""
    processes = engine.start(1)
    for name, sources in cases.items():
        config = load(PlanConfig, sources)
        figures = measure(config, replace(processes, sequence=config.parallel.sequence))
        Path(folder, f"{name}.{processes.rank}.json").write_text(json.dumps(figures))
    engine.stop()


def measure(config, processes):
    model = VideoDiT(config.dit)
    model.init_weights()
    group = Spread(config=config, processes=processes).group
    parallelize(model, config.parallel, group, gathered=config.deepspeed.zero_stage == 3)
    running = engine.Engine(model, loss, config, processes)
    average = EMA(running.fragments(), 0.9)
    found, kept = {}, []
    optimizer, stage = running.deepspeed.optimizer, config.deepspeed.zero_stage
    whole = stage == 1 and config.deepspeed.precision == "fp32"
    inner = optimizer.optimizer if stage else optimizer
    update = inner.step

    def recording(*args, **options):
        copies = [p.grad for p in masters(running) if p.grad is not None]
        copies = [grad for grad in copies if all(not shared(grad, other) for other in kept)]
        found["step"] = max(found.get("step", 0), storage_bytes(copies))
        return update(*args, **options)

    inner.step = recording
    if whole:  # its gradients are whole until this runs
        reduce = optimizer.reduce_gradients

        def reducing(*args, **options):
            found["gradients"] = storage_bytes([p.grad for p in model.parameters()])
            return reduce(*args, **options)

        optimizer.reduce_gradients = reducing
    for step in range(2):
        with Saved(model) as saved:
            running.backward(batch(config, config.data.batch_size // processes.replicas), step)
        found["activations"] = saved.bytes
        if not whole:
            kept[:] = gradients(running, stage)
            found["gradients"] = storage_bytes(kept)
        running.update(1e-3)
        average.update(step)
    found["ema"] = storage_bytes(average.values)
    found |= states(running, inner, stage)
    return found


def gradients(running, stage):
    if stage == 0:
        return [p.grad for p in running.model.parameters()]
    if stage == 3:
        return [running.deepspeed.optimizer.grad_partitions_flat_buffer]
    return [tensor for group in running.deepspeed.optimizer.averaged_gradients.values() for tensor in group]


def states(running, inner, stage):
    parameters = [p.data for p in running.model.parameters()]
    if stage == 3:
        parameters += [p.ds_tensor for p in running.model.parameters()]
    moments = [value for state in inner.state.values() for value in state.values()]
    return {
        "parameters": storage_bytes(parameters),
        "optimizer": storage_bytes([*moments, *masters(running)]),
    }


def masters(running):
    """The fp32 weights beside those that the model computes with; without ZeRO there are none."""
    if running.stage == 0:
        return []
    optimizer = running.deepspeed.optimizer
    return (
        optimizer.fp32_partitioned_groups_flat
        if running.stage == 3
        else optimizer.single_partition_of_fp32_groups
    )
