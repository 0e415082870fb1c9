"""Provenance: durable files, run locks, the lineage of every artifact; the experiment's RO-Crate is in `crate`."""

from vipo.provenance.environment import code_identity, git_state, package_sha256
from vipo.provenance.files import StorageError, atomic_file, atomic_folder, file_sha256, fsync_path
from vipo.provenance.lineage import hashed, is_made, record_stage
from vipo.provenance.locks import RunLocked, run_lock
from vipo.provenance.records import ProvenanceError, read_provenance, verify_outputs
from vipo.provenance.signature import SignatureError, sign_file, verify_file

__all__ = [
    "ProvenanceError",
    "RunLocked",
    "SignatureError",
    "StorageError",
    "atomic_file",
    "atomic_folder",
    "code_identity",
    "file_sha256",
    "fsync_path",
    "git_state",
    "hashed",
    "is_made",
    "package_sha256",
    "read_provenance",
    "record_stage",
    "run_lock",
    "sign_file",
    "verify_file",
    "verify_outputs",
]
