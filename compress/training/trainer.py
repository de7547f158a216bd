"""Runs a recipe: stages of epochs, a checkpoint after each, the same result whether or not the run was interrupted.

A run's folder holds ``checkpoint.pt`` (the stage under way), ``stage-N.pt`` (the trained weights of finished stages,
before their techniques' `finish`), the logs (`compress.training.log`) and, in the end, the results
(`compress.training.results`). Structure is never stored: a resumed run builds the network, replays start, weights and
finish of the stages before, and goes on. All files are read without running code (``weights_only=True``).
"""
from contextlib import contextmanager
import os
from pathlib import Path
import pickle       # for its exception alone
import time
import zipfile

from threadpoolctl import threadpool_limits
import torch
from torch.nn import functional
from torch.nn.utils import parametrize

from compress.training import log, networks, weights
from spec.errors import InputError

#: What `torch.load` raises for files that are not what they should be.
DAMAGED = (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, pickle.UnpicklingError,
           zipfile.BadZipFile)
#: Images of one evaluation step.
EVALUATION_BATCH = 500


class Trainer:
    """One run of a recipe in a folder.

    Args:
        recipe, digest: see `recipe.load`. dataset: `loader.Dataset`. folder: of checkpoints and logs.
        progress: called with (message, fraction 0..1, detail).
    Attributes after `run`: ``model`` (final form), ``rows`` (log of all epochs).
    """

    def __init__(self, recipe, digest, dataset, folder, *, progress=None):
        self.recipe, self.digest, self.dataset, self.folder = recipe, digest, dataset, Path(folder)
        self.progress = progress or (lambda *_: None)
        self.rows, self.generator, self.saved = [], torch.Generator(), None

    # -- models --------------------------------------------------------------------------------------------------
    def build(self):
        """The network of the recipe with its first weights."""
        torch.manual_seed(self.recipe.seed)                  # layers initialise themselves from PyTorch's generator
        model = networks.build(self.recipe.network, self.dataset.classes)
        if tuple(model.input_shape) != self.dataset.shape:
            raise InputError(f"needs images of {model.input_shape} (channels, height, width)", field="network",
                             value=self.dataset.shape)
        if self.recipe.weights is not None:
            weights.load(model, self.recipe.weights)
        return model.to(memory_format=torch.channels_last)

    def teacher(self, distill):
        """The network that a stage is distilled from, in evaluation mode."""
        if distill.network is None:
            model = self.build()
        else:
            model = networks.build(distill.network, self.dataset.classes)
            weights.load(model, distill.weights)
        return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    # -- the run -------------------------------------------------------------------------------------------------
    def run(self, *, restart=False):
        """Train all stages; resumes where a killed run of the same recipe stopped, unless ``restart``.

        Raises: InputError if the folder holds a run of another recipe, or a damaged checkpoint.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if restart:
            for path in (*self.folder.glob("stage-*.pt"), self.folder / "checkpoint.pt"):
                path.unlink(missing_ok=True)
        self.saved = self._read("checkpoint.pt")
        with settings(self.recipe):
            self.generator.manual_seed(self.recipe.seed)
            self.model = self.build()
            first = 0
            if self.saved is not None:
                first, self.rows = self.saved["stage"], self.saved["rows"]
            for number in range(min(first, len(self.recipe.stages))):
                self._replay(number)
            for number in range(first, len(self.recipe.stages)):
                self._stage(number)
        return self.model

    def _replay(self, number):
        """A finished stage again, from its stored weights."""
        stage, saved = self.recipe.stages[number], self._read(f"stage-{number}.pt")
        if saved is None:
            raise InputError("must be there: an interrupted run needs its finished stages",
                             source=self.folder / f"stage-{number}.pt")
        techniques = self._start(stage)
        self._restore(self.model, saved, techniques, f"stage-{number}.pt")
        self._finish(stage, techniques)

    def _start(self, stage):
        techniques = stage.techniques()
        for n, technique in enumerate(techniques):
            try:
                technique.start(self.model)
            except InputError as error:
                raise error.inside(f"stage {stage.name}: techniques[{n}]") from None
        return techniques

    def _restore(self, model, saved, techniques, name):
        try:
            model.load_state_dict(saved["model"])
            for technique, state in zip(techniques, saved["techniques"], strict=True):
                technique.load_state_dict(state)
        except DAMAGED as error:
            text = str(error).splitlines()[0][:160]
            raise InputError(f"must fit the recipe ({text})", source=self.folder / name) from None

    def _finish(self, stage, techniques):
        for technique in techniques:
            technique.finish()
        self.model.to(memory_format=torch.channels_last)
        if stage.settle:
            settle(self.model, self.dataset, stage, torch.Generator().manual_seed(self.recipe.seed))

    def _stage(self, number):
        stage = self.recipe.stages[number]
        techniques = self._start(stage)
        self.epochs(stage, self.model, number, techniques)
        self._save(f"stage-{number}.pt", number, stage.epochs, self.model, techniques)
        self._finish(stage, techniques)
        self.rows.append({"stage": stage.name, "epoch": stage.epochs, "finished": True,
                          "validation_accuracy": accuracy(self.model, self.dataset, "validation")})
        log.write(self.folder, self.rows)

    def epochs(self, stage, model, number, techniques=(), *, key=""):
        """The epochs of ``stage`` on ``model``, each followed by a checkpoint; those that a killed run has done are
        taken from its checkpoint, if that is of the same stage ``number`` and ``key`` (what the recipe's digest leaves
        out)."""
        phase = Phase(stage, model, self.dataset, precision=self.recipe.precision,
                      generator=self.generator, techniques=techniques,
                      teacher=stage.distill and self.teacher(stage.distill))
        saved, first = self.saved, 0
        if saved is not None and saved["stage"] == number and saved["key"] == key:
            self._restore(model, saved, techniques, "checkpoint.pt")
            phase.load_state_dict(saved["phase"])
            self.generator.set_state(saved["generator"])
            torch.set_rng_state(saved["torch_generator"])
            first = saved["epoch"]
        else:
            self.rows = [row for row in self.rows if row["stage"] != stage.name]
        for epoch in range(first, stage.epochs):
            self.rows.append({"stage": stage.name, "epoch": epoch + 1} |
                             phase.epoch(epoch, self._teller(number, stage, epoch)))
            self._save("checkpoint.pt", number, epoch + 1, model, techniques, phase=phase.state_dict(), key=key)
            log.write(self.folder, self.rows)
        if stage.average and stage.epochs:
            phase.take_average()

    def _teller(self, number, stage, epoch):
        stages = [*self.recipe.stages, stage][:max(len(self.recipe.stages), number + 1)]
        total = sum(s.epochs for s in stages)
        done = sum(s.epochs for s in stages[:number]) + epoch

        def tell(fraction, loss):
            self.progress(f"{stage.name} {epoch + 1}/{stage.epochs}", (done + fraction) / total, f"loss {loss:.3f}")
        return tell

    # -- files ---------------------------------------------------------------------------------------------------
    def _save(self, name, number, epoch, model, techniques, **more):
        self._write(name, {"stage": number, "epoch": epoch, "rows": self.rows, "model": model.state_dict(),
                           "techniques": [t.state_dict() for t in techniques]} | more)

    def _write(self, name, content):
        part = self.folder / f".{name}.part"
        torch.save(content | {"recipe": self.digest, "generator": self.generator.get_state(),
                              "torch_generator": torch.get_rng_state()}, part)
        os.replace(part, self.folder / name)

    def _read(self, name):
        path = self.folder / name
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            recipe = saved["recipe"]
        except DAMAGED as error:
            raise InputError(f"must be a checkpoint of summand train ({type(error).__name__}); --restart begins anew",
                             source=path) from None
        if recipe != self.digest:
            raise InputError("is a checkpoint of another recipe; choose another --out, or --restart", source=path)
        return saved


@contextmanager
def settings(recipe):
    """Global settings while a run lasts: threads of PyTorch and of NumPy's linear algebra, determinism."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(recipe.deterministic)
    # determinism does not need it where no operation reads memory that it has not written; it costs up to a fifth
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with threadpool_limits(recipe.threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Phase:
    """The epochs of one stage on one model."""

    def __init__(self, stage, model, dataset, *, precision, generator, techniques=(), teacher=None):
        self.stage, self.model, self.dataset, self.precision = stage, model, dataset, precision
        self.generator, self.techniques, self.teacher = generator, techniques, teacher
        self.optimizer = stage.optimizer.make(model) if stage.epochs else None
        self.steps = dataset.steps(stage.batch)
        self.mean = [p.detach().clone() for p in model.parameters()] if stage.average else None

    def epoch(self, number, tell=lambda fraction, loss: None):
        """One epoch; returns its row for the log."""
        stage, began = self.stage, time.monotonic()
        for technique in self.techniques:
            technique.begin_epoch(number, stage.epochs)
        self.model.train()
        seen, right, total = 0, 0, 0.0
        for step, (x, labels) in enumerate(self.dataset.batches(stage.batch, self.generator)):
            rate = stage.optimizer.rate * stage.schedule((number + step / self.steps) / stage.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, hits = self._step(x, labels)
            seen, right, total = seen + len(labels), right + hits, total + loss * len(labels)
            tell((step + 1) / self.steps, total / seen)
            if not total < float("inf"):
                raise InputError(f"diverged in epoch {number + 1} (the loss is not finite): a smaller rate may help",
                                 field=f"stage {stage.name}")
        seconds = time.monotonic() - began
        figures = {}
        for technique in self.techniques:
            figures |= technique.figures()
            if hasattr(technique, "projected"):              # the accuracy of W says little about that of Proj(W)
                with technique.projected():
                    figures["projected_accuracy"] = accuracy(self.model, self.dataset, "validation")
        return {"rate": rate, "loss": total / seen, "train_accuracy": right / seen,
                "validation_accuracy": accuracy(self.model, self.dataset, "validation"),
                "seconds": seconds, "images_per_second": seen / seconds} | figures

    def _step(self, x, labels):
        with parametrize.cached():
            # parametrised weights are made once, in float32, before autocast would round their factors
            for module in self.model.modules():
                if parametrize.is_parametrized(module):
                    for name in module.parametrizations:
                        getattr(module, name)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
                logits = self.model(x)
            loss = self._loss(x, logits.float(), labels)
            total = loss + sum(t.penalty() for t in self.techniques)
        self.optimizer.zero_grad()
        total.backward()
        for technique in self.techniques:
            technique.after_backward()
        self.optimizer.step()
        for technique in self.techniques:
            technique.after_step()
        if self.mean is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.mean, list(self.model.parameters()), 1 - self.stage.average)
        return float(loss.detach()), int((logits.argmax(1) == labels).sum())

    def _loss(self, x, logits, labels):
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.stage.smoothing)
        if self.teacher is None:
            return loss
        d = self.stage.distill
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            goal = functional.log_softmax(self.teacher(x).float() / d.temperature, dim=1)
        soft = functional.kl_div(functional.log_softmax(logits / d.temperature, dim=1), goal, log_target=True,
                                 reduction="batchmean")
        return (1 - d.weight) * loss + d.weight * d.temperature ** 2 * soft

    @torch.no_grad()
    def take_average(self):
        """The running mean of the weights takes their place; statistics of normalisation are those of the last."""
        for parameter, mean in zip(self.model.parameters(), self.mean):
            parameter.copy_(mean)

    def state_dict(self):
        """Optimiser and running mean."""
        return {"optimizer": self.optimizer.state_dict() if self.optimizer else None, "mean": self.mean}

    def load_state_dict(self, state):
        """Take back `state_dict`."""
        if self.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        self.mean = state["mean"]


@torch.no_grad()
def logits_of(model, dataset, split):
    """Float32 outputs [N, classes] on a split (``train`` without augmentation)."""
    model.eval()
    images = getattr(dataset, split)[0]
    return torch.cat([model(dataset.normalized(images[at:at + EVALUATION_BATCH])).float()
                      for at in range(0, len(images), EVALUATION_BATCH)])


def accuracy(model, dataset, split):
    """Share of right answers on a split."""
    labels = torch.from_numpy(getattr(dataset, split)[1].astype("int64"))
    return float((logits_of(model, dataset, split).argmax(1) == labels).double().mean())


@torch.no_grad()
def settle(model, dataset, stage, generator):
    """Renews the statistics of batch normalisation: plain means over ``stage.settle`` batches."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    model.train()
    left = stage.settle
    while left and norms:
        for x, _ in dataset.batches(stage.batch, generator):
            model(x)
            left -= 1
            if not left:
                break
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
