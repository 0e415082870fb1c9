"""Weights & Biases, offline: ``trackers/wandb/offline-run-*`` of a run folder, sent by ``wandb sync`` when you like."""

import os
import secrets
import shutil

from vipo.tracking.tracker import Row, TrackedRun


class WeightsAndBiases:
    """One offline run, made anew by each process of a resumed run with the rows so far: W&B cannot take rows back.

    It keeps the first process's id, so that a later ``wandb sync`` replaces what an earlier one sent.
    """

    def __init__(self, run: TrackedRun) -> None:
        earlier = sorted(path.name.rpartition("-")[2] for path in run.folder.glob("offline-run-*-*"))
        if run.folder.exists():
            shutil.rmtree(run.folder)
        run.folder.mkdir(parents=True)
        # Before the import, which reads them: no reports to W&B of its own errors, no files in the user's home.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        for place in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            os.environ[place] = str(run.folder / "own")
        import wandb

        self._picture, self._exit_code = wandb.Image, 0
        self._run = wandb.init(
            mode="offline",
            # It makes a folder `wandb` there.
            dir=run.folder.parent,
            id=earlier[0] if earlier else secrets.token_hex(4),
            project=run.experiment,
            name=run.name,
            config=dict(run.config),
            reinit="create_new",
            # Nothing of the machine, the code or the terminal: provenance.json tells of them.
            settings=wandb.Settings(
                silent=True,
                console="off",
                symlink=False,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        # To its service's own log, by a path that a copy of the run does not have.
        for path in run.folder.rglob("*"):
            if path.is_symlink():
                path.unlink()
        for row in run.history:
            self.log(row)

    def log(self, row: Row) -> None:
        """One step of all values and pictures."""
        pictures = {name: self._picture(str(path)) for name, path in row.pictures.items()}
        self._run.log({**row.values, **pictures}, step=row.update, commit=True)

    def ended_early(self, stopped: bool) -> None:
        """The run failed, or was stopped, which W&B does not tell apart."""
        self._exit_code = 1

    def close(self) -> None:
        """Write the run's end."""
        self._run.finish(exit_code=self._exit_code)
