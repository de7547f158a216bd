"""Runs a recipe: stages of epochs, a checkpoint after each, the same result whether or not the run was interrupted.

A run's folder holds ``checkpoint.pt`` (the stage under way), ``stage-N.pt`` (the trained weights of finished stages,
before their techniques' `finish`), the logs (`compress.training.log`) and, in the end, the results
(`compress.training.results`). Structure is never stored: a resumed run builds the network, replays start, weights and
finish of the stages before, and goes on. All files are read without running code (``weights_only=True``).
"""
from contextlib import contextmanager
from dataclasses import replace
import hashlib
from pathlib import Path
import time
import warnings

from threadpoolctl import threadpool_limits
import torch
from torch.nn import functional
from torch.nn.utils import parametrize

from compress import graph
from compress.training import log, networks, weights
from compress.training.parametrizations import materialize
from compress.training.technique import weighted_layers
from spec.errors import InputError
from spec.strict_yaml import read_regular_file

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
        model = self._network(self.recipe.network)
        if self.recipe.weights is not None:
            weights.load(model, self.recipe.weights)
        return model.to(memory_format=torch.channels_last)

    def _network(self, name, field="network"):
        model = networks.build(name, self.dataset.classes)
        if tuple(model.input_shape) != self.dataset.shape:
            raise InputError(f"needs images of {model.input_shape} (channels, height, width)", field=field,
                             value=self.dataset.shape)
        return model

    def teacher(self, distill):
        """The network that a stage is distilled from, in evaluation mode."""
        if distill.network is None:
            model = self.build()
        else:
            model = self._network(distill.network, "distill.network")
            weights.load(model, distill.weights)
        return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    # -- the run -------------------------------------------------------------------------------------------------
    def run(self, *, restart=False):
        """Train all stages; resumes where a killed run of the same recipe stopped, unless ``restart``.

        Raises: InputError if the folder holds a run of another recipe, or a damaged checkpoint.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if restart:
                for path in (*self.folder.glob("stage-*.pt"), self.folder / "checkpoint.pt"):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"must be a folder that can be written ({error.strerror})", source=self.folder) from None
        self.inputs = self._inputs()
        self.saved = self._read("checkpoint.pt")
        with settings(self.recipe):
            if self.saved is None:
                self._rehearse()
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

    def _inputs(self):
        """sha256 of the first weights and of the data, which a run must not change on its way."""
        path = self.recipe.weights
        first = read_regular_file(path, max_bytes=weights.MAX_FILE_BYTES) if path is not None else b""
        return hashlib.sha256(hashlib.sha256(first).digest() + self.dataset.digest().encode()).hexdigest()

    def _rehearse(self):
        """What stages ask for that the network cannot give is found before any of them is trained, as far as it does
        not depend on trained weights."""
        self.model = self.build()
        for stage in self.recipe.stages:
            if stage.distill is not None:
                self.teacher(stage.distill)
            techniques = self._start(stage)
            if not all(t.foreseeable for t in techniques):
                return
            self._end(stage, techniques)
        plan = self.recipe.package
        if plan is not None:
            if plan.integer is not None and plan.integer.distill is not None:
                self.teacher(plan.integer.distill)
            names = [graph.layer_name(name) for name in weighted_layers(materialize(self.model))]
            layers = {graph.layer_name(name): method for name, method in plan.methods.layers.items()}
            try:
                replace(plan.methods, layers=layers).check(names)
            except InputError as error:
                raise error.inside("package") from None

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
                technique.check(stage.epochs)
            except InputError as error:
                raise error.inside(f"stage {stage.name}: techniques[{n}]") from None
        return techniques

    def _end(self, stage, techniques):
        """`finish` of all techniques."""
        for n, technique in enumerate(techniques):
            field = f"stage {stage.name}: techniques[{n}]"
            try:
                technique.finish()
            except InputError as error:
                raise error.inside(field) from None
            except AttributeError:
                if len(techniques) == 1:
                    raise
                raise InputError("must not share layers with another technique of the stage that gives them a form",
                                 field=field) from None

    def _restore(self, model, saved, techniques, name, phase=None):
        try:
            model.load_state_dict(saved["model"])
            for technique, state in zip(techniques, saved["techniques"], strict=True):
                technique.load_state_dict(state)
            if phase is not None:
                phase.load_state_dict(saved["phase"])
            self.generator.set_state(saved["generator"])         # what comes next is as without an interruption
            torch.set_rng_state(saved["torch_generator"])
        except weights.DAMAGED as error:
            text = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise InputError(f"must fit the recipe ({text})", source=self.folder / name) from None

    def _finish(self, stage, techniques):
        self._end(stage, techniques)
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
        if saved is not None and saved["stage"] == number and saved.get("key") == key:
            self._restore(model, saved, techniques, "checkpoint.pt", phase)
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
        content |= {"recipe": self.digest, "inputs": self.inputs, "generator": self.generator.get_state(),
                    "torch_generator": torch.get_rng_state()}
        log.replace(self.folder / name, lambda part: torch.save(content, part))

    def _read(self, name):
        path = self.folder / name
        if not path.exists():
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                  # advice on old formats
                saved = torch.load(path, map_location="cpu", weights_only=True)
            recipe, whole = saved["recipe"], (saved["stage"], saved["epoch"])
            if not all(isinstance(n, int) and n >= 0 for n in whole) or \
                    not all(isinstance(row["stage"], str) for row in list(saved["rows"])):
                raise ValueError
        except weights.DAMAGED as error:
            raise InputError(f"must be a checkpoint of summand train ({type(error).__name__}); --restart begins anew",
                             source=path) from None
        if recipe != self.digest:
            raise InputError("is a checkpoint of another recipe; choose another --out, or --restart", source=path)
        if saved.get("inputs", self.inputs) != self.inputs:
            raise InputError("is a checkpoint of a run on other first weights or data; choose another --out, or "
                             "--restart", source=path)
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
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise InputError(f"diverged in epoch {number + 1} (a weight is not finite): a smaller rate may help",
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
