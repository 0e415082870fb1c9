"""Provenance: durable files, run locks, the lineage of every artifact, and the experiment's RO-Crate."""

from vipo.provenance.crate import write_crate
from vipo.provenance.environment import git_state, package_sha256
from vipo.provenance.files import StorageError, atomic_file, atomic_folder, file_sha256, fsync_path
from vipo.provenance.lineage import ProvenanceError, read_provenance, record_stage, verify_outputs
from vipo.provenance.locks import RunLocked, run_lock

__all__ = [
    "ProvenanceError",
    "RunLocked",
    "StorageError",
    "atomic_file",
    "atomic_folder",
    "file_sha256",
    "fsync_path",
    "git_state",
    "package_sha256",
    "read_provenance",
    "record_stage",
    "run_lock",
    "verify_outputs",
    "write_crate",
]
