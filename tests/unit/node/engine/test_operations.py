"""The list of operations that SavedModels may have, against all operations that the installed TensorFlow registers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from node.engine.operations import ALLOWED, FILLS_TABLE, PYTHON, READS_CHECKPOINT, WRITES_CHECKPOINTS

pytestmark = pytest.mark.tensorflow

WORDS = {
    "address", "ckpt", "cluster", "communication", "debug", "descriptor", "device", "devices", "dir", "directory", "file", "filename",
    "filenames", "filepath", "gated", "job", "memory", "output_stream", "path", "prefix", "protocol", "region", "task", "token", "url",
    "urls", "vocab", "worker",
}  # fmt: skip
"""Words in names of attributes and inputs: things other than the model's numbers that an operation may work with."""
NAMES = re.compile(
    r"^_|File|Dataset|Iterator|Reader|Summary|Debug|Dump|Print|Event|Rpc|Remote|Send$|Recv|TPU|Tpu|Infeed|Outfeed|Collective|Nccl|DTensor|"
    r"Mesh|Relayout|Xla|PyFunc|Session|Queue|Barrier|Stage|Mutex|Abort|Sleep|Save|Restore|Checkpoint|Mlir|Host|System|Worker|Calibration"
)
HARMLESS = {
    "ShardedFilename": "it makes a name, and opens nothing",
    "device_names": "DeviceIndex says which of them it runs on: Keras's LSTM asks it which kernel is the right one",
    "allowed_devices": "a variable's handle says where the variable may be",
    "debug_name": "it stands in error messages",
    "swap_memory": "from a GPU to the host",
}
DANGEROUS = {
    "Abort", "BatchFunction", "CacheDataset", "CacheDatasetV2", "CalibrationStatisticsSaver", "Copy", "CopyHost", "CreateSummaryDbWriter",
    "CreateSummaryFileWriter", "DataServiceDatasetV4", "DebugIdentity", "DebugIdentityV2", "DebugIdentityV3", "DecodeProtoV2",
    "DistributedSave", "DTensorRestoreV2", "DumpTensor", "EagerPyFunc", "Empty", "EncodeProto", "FileSystemSetConfiguration",
    "FixedLengthRecordDatasetV2", "FixedLengthRecordReaderV2", "FixedUnigramCandidateSampler", "GenerateVocabRemapping", "GeneratorDataset",
    "GetSessionTensor", "ImmutableConst", "ImportEvent", "InitializeTableFromTextFile", "InitializeTableFromTextFileV2", "LMDBDataset",
    "LoadAndRemapMatrix", "LoadDataset", "MatchingFiles", "MatchingFilesDataset", "MergeV2Checkpoints", "NegTrain", "OneShotIterator",
    "Print", "PrintV2", "PyFunc", "PyFuncStateless", "ReadFile", "RecordInput", "RemoteCall", "Restore", "RestoreSlice", "RestoreV2",
    "RpcCall", "RpcServer", "Save", "SaveDatasetV2", "SaveSlices", "SaveV2", "Skipgram", "SnapshotDatasetV2", "SqlDataset",
    "TFRecordDatasetV2", "TFRecordReaderV2", "TextLineDataset", "TextLineReaderV2", "WholeFileReaderV2", "WriteFile", "WriteGraphSummary",
    "WriteScalarSummary", "XlaCallModule", "XlaCustomCallV2", "XlaHostCompute", "XlaLaunch", "_Recv", "_Send",
}  # fmt: skip


@pytest.fixture(scope="module")
def registered() -> dict[str, Any]:
    from tensorflow.core.framework.op_def_pb2 import OpList
    from tensorflow.python.client import pywrap_tf_session

    found = OpList.FromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList()))
    assert len(found.op) > 1000
    return {each.name: each for each in found.op}


def touching(definition: Any) -> list[str]:
    """The parts of an operation which show that it works with more than the model."""
    found = [definition.name] if NAMES.search(definition.name) else []
    given = [each.name for each in (*definition.attr, *definition.input_arg)]
    return found + [name for name in given if WORDS & {name, *name.split("_")}]


def test_nothing_on_the_list_says_that_it_touches_more_than_the_model(registered: dict[str, Any]) -> None:
    found = {name: touching(registered[name]) for name in ALLOWED & registered.keys()}
    assert {name: words for name, words in found.items() if set(words) - HARMLESS.keys()} == {}


def test_what_is_known_to_be_dangerous_is_not_on_the_list(registered: dict[str, Any]) -> None:
    assert ALLOWED & (DANGEROUS | PYTHON | WRITES_CHECKPOINTS | FILLS_TABLE | {READS_CHECKPOINT}) == set()
    assert len(DANGEROUS & registered.keys()) > 50  # they are names of real operations


def test_the_patterns_find_what_is_dangerous(registered: dict[str, Any]) -> None:
    """They could miss everything, and the test above would still pass."""
    quiet = {name for name in DANGEROUS & registered.keys() if not touching(registered[name])}
    assert quiet <= {"BatchFunction", "Empty", "NegTrain"}  # dangerous by what they do, which their names do not say


def test_stateful_operations_keep_state_of_the_model_alone(registered: dict[str, Any]) -> None:
    """Each possible kind of state is named here."""
    kinds = re.compile(
        r"Variable|VarHandle|^VarIs|HashTable|LookupTable|InitializeTable|^TensorArray|^Stack|^Resource|^Random|^Stateful|^Rng|Sampler$|"
        r"Assert|CheckNumerics|^(If|Case|While)$|CudnnRNN|TruncatedNormal|Multinomial|NonDeterministicInts|SampleDistorted|Algo?$|DeepCopy|"
        r"DisableCopyOnRead|DeviceIndex|DestroyResourceOp|GuaranteeConst"
    )
    stateful = {name for name in ALLOWED & registered.keys() if registered[name].is_stateful}
    assert {name for name in stateful if not kinds.search(name)} == set()
