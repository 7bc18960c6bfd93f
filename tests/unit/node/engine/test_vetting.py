"""SavedModels that TensorFlow and Keras write pass; forged ones, in which an operation reads or writes files, do not."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potluck.errors import CodeNotAllowed, InvalidModel
from support.models import saved

pytestmark = pytest.mark.tensorflow
Forge = Callable[[Any], None]


def chained(count: int) -> Any:
    """Each of many operations takes the name of its file through a chain of as many others."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    saved = SavedModel()
    meta = saved.meta_graphs.add()

    def node(name: str, op: str, *inputs: str) -> str:
        meta.graph_def.node.add(name=name, op=op, input=inputs)
        return name

    asset = node("asset", "Const")
    meta.asset_file_def.add(filename="words.txt").tensor_info.name = "asset:0"
    handle, last, prefix = node("handle", "VarHandleOp"), asset, node("saver", "Const")
    node("assign", "AssignVariableOp", handle, asset)
    for number in range(count):
        last = node(f"same{number}", "Identity", last)
        prefix = node(f"default{number}", "PlaceholderWithDefault", prefix)
        node(f"chain{number}", "InitializeTableFromTextFileV2", "table", f"same{count - 1}")
        node(
            f"variable{number}",
            "InitializeTableFromTextFileV2",
            "table",
            node(f"value{number}", "ReadVariableOp", handle),
        )
        own = node(f"own{number}", "VarHandleOp")
        node(f"give{number}", "AssignVariableOp", own, asset)
        node(f"each{number}", "InitializeTableFromTextFileV2", "table", node(f"get{number}", "ReadVariableOp", own))
        node(f"restore{number}", "RestoreV2", "prefix")
    node("prefix", "PlaceholderWithDefault", prefix)
    meta.saver_def.filename_tensor_name = "prefix:0"
    return saved


def test_time_grows_with_the_size_and_not_with_its_square() -> None:
    def seconds(count: int) -> float:
        model = chained(count)
        began = time.process_time()
        vet(model)
        return time.process_time() - began

    assert seconds(4000) < 12 * max(0.05, seconds(1000))


def read(folder: Path) -> Any:
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    return SavedModel.FromString((folder / "saved_model.pb").read_bytes())


def vet(model: Any) -> Any:
    """The model's remaining parts."""
    from node.engine import vetting

    vetting.vet(model)
    return model


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel of version 2, with a variable, and a table from a file."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("words")
    (folder / "words.txt").write_text("a\nb\n")

    class Words(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
            lines = tf.lookup.TextFileInitializer(str(folder / "words.txt"), tf.string, line, tf.int64, number)
            self.table, self.weight = tf.lookup.StaticHashTable(lines, -1), tf.Variable(2.0)

        @tf.function  # type: ignore[untyped-decorator]
        def serve(self, x: Any) -> Any:
            return {"y": self.weight * tf.cast(self.table.lookup(x), tf.float32)}

    module = Words()
    function = module.serve.get_concrete_function(tf.TensorSpec((None,), tf.string, name="x"))
    tf.saved_model.save(module, folder / "model", signatures={"serving_default": function})
    return folder / "model"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in version 1: one graph, without functions and objects."""
    import tensorflow as tf

    v1, folder = tf.compat.v1, tmp_path_factory.mktemp("old")
    (folder / "words.txt").write_text("a\nb\n")
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.string, (None,), name="x")
        line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
        lines = tf.lookup.TextFileInitializer(str(folder / "words.txt"), tf.string, line, tf.int64, number)
        table = v1.lookup.StaticHashTable(lines, -1)
        y = tf.cast(table.lookup(x), tf.float32) * v1.get_variable("w", (), initializer=v1.ones_initializer())
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        builder = v1.saved_model.Builder(str(folder / "model"))
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {"serving_default": v1.saved_model.predict_signature_def({"x": x}, {"y": y})},
            assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
            main_op=v1.tables_initializer(),
        )
        builder.save()
    return folder / "model"


def operations(model: Any) -> set[str]:
    graph = model.meta_graphs[0].graph_def
    return {node.op for nodes in (graph.node, *(each.node_def for each in graph.library.function)) for node in nodes}


@pytest.mark.parametrize("version", ["words", "old"])
def test_savers_and_tables_may_be_where_they_belong(
    version: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import tensorflow as tf

    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(version), folder)
    model = vet(read(folder))
    assert operations(model) >= {"RestoreV2", "InitializeTableFromTextFileV2"}
    assert not operations(model) & {"SaveV2", "MergeV2Checkpoints"}
    (folder / "saved_model.pb").write_bytes(model.SerializeToString())
    loaded = tf.saved_model.load(folder)
    assert loaded.signatures["serving_default"](x=tf.constant(["b", "c"]))["y"].numpy().tolist() in ([2, -2], [1, -1])
    session = tf.compat.v1.Session(graph=tf.Graph())  # as the LiteRT converter loads it, with what the saver restores
    tf.compat.v1.saved_model.loader.load(session, ["serve"], str(folder))
    session.close()
    assert operations(vet(read(folder))) == operations(model)  # what was cut is not missed


def function(model: Any, part: str) -> Any:
    return next(each for each in model.meta_graphs[0].graph_def.library.function if part in each.signature.name)


def node(nodes: Any, operation: str) -> Any:
    return next(each for each in nodes if each.op == operation)


def text(nodes: Any, name: str, value: bytes) -> None:
    """A constant."""
    import tensorflow as tf

    nodes.add(name=name, op="Const").attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))


def reads_another_checkpoint(model: Any) -> None:
    nodes = function(model, "traced_restore").node_def
    text(nodes, "elsewhere", b"/var/other/variables")
    node(nodes, "RestoreV2").input[0] = "elsewhere:output:0"


def joins_another_name(model: Any) -> None:
    nodes = function(model, "traced_restore").node_def
    text(nodes, "up", b"/../../../etc/x")
    nodes.add(name="joined", op="StringJoin").input.extend(["file_prefix", "up:output:0"])
    node(nodes, "RestoreV2").input[0] = "joined:output:0"


def restores_from_a_constant(model: Any) -> None:
    meta = model.meta_graphs[0]
    text(meta.graph_def.node, "elsewhere", b"/var/other/variables")
    next(each for each in meta.graph_def.node if each.name == meta.saver_def.restore_op_name).input[0] = "elsewhere"


def names_a_constant_as_the_loaders(model: Any) -> None:
    restores_from_a_constant(model)
    model.meta_graphs[0].saver_def.filename_tensor_name = "elsewhere:0"


def gives_away_its_restore(model: Any) -> None:
    meta = model.meta_graphs[0]
    meta.object_graph_def.concrete_functions[function(model, "traced_restore").signature.name].SetInParent()


def gives_away_its_save(model: Any) -> None:
    meta = model.meta_graphs[0]
    meta.object_graph_def.concrete_functions[function(model, "traced_save").signature.name].SetInParent()


def serves_its_restore(model: Any) -> None:
    meta = model.meta_graphs[0]
    meta.signature_def["serving_default"].outputs["y"].name = meta.saver_def.restore_op_name + ":0"


def serves_its_save(model: Any) -> None:
    meta = model.meta_graphs[0]
    meta.signature_def["serving_default"].outputs["y"].name = meta.saver_def.save_tensor_name


def saves_when_it_is_loaded(model: Any) -> None:
    meta = model.meta_graphs[0]
    first = next(each for each in meta.graph_def.node if each.name == "NoOp")
    first.input.append("^" + meta.saver_def.save_tensor_name.partition(":")[0])


def calls_its_save(model: Any) -> None:
    nodes = function(model, "signature_wrapper").node_def
    call = nodes.add(name="evil", op="StatefulPartitionedCall")
    call.attr["f"].func.name = function(model, "traced_save").signature.name
    call.input.extend(["x", "unknown", "unknown_0"])


def fills_its_table_from_a_constant(model: Any) -> None:
    nodes = function(model, "_initializer").node_def
    text(nodes, "elsewhere", b"/etc/passwd")
    node(nodes, "InitializeTableFromTextFileV2").input[1] = "elsewhere:output:0"


def fills_its_table_from_an_input(model: Any) -> None:
    meta = model.meta_graphs[0]
    name = function(model, "_initializer").signature.name
    del meta.object_graph_def.concrete_functions[name].bound_inputs[:]


def fills_its_table_from_what_is_no_asset(model: Any) -> None:
    meta = model.meta_graphs[0]
    name = function(model, "_initializer").signature.name
    place = meta.object_graph_def.concrete_functions[name].bound_inputs[0]
    meta.object_graph_def.nodes[place].constant.operation = "Const"


def has_an_asset_elsewhere(model: Any) -> None:
    model.meta_graphs[0].asset_file_def[0].filename = "../../../../etc/passwd"


def has_an_absolute_asset(model: Any) -> None:
    model.meta_graphs[0].asset_file_def[0].filename = "/etc/passwd"


def assigns_its_assets_name(model: Any) -> None:
    nodes = model.meta_graphs[0].graph_def.node
    text(nodes, "elsewhere", b"/etc/passwd")
    nodes.add(name="again", op="AssignVariableOp").input.extend(["Variable", "elsewhere"])


def has_another_handle_of_its_assets_name(model: Any) -> None:
    nodes = model.meta_graphs[0].graph_def.node
    other = nodes.add(name="other", op="VarHandleOp")
    other.CopyFrom(next(each for each in nodes if each.name == "Variable"))
    other.name, other.attr["shared_name"].s = "other", b"Variable"


FORGED: list[Forge] = [
    reads_another_checkpoint, joins_another_name, restores_from_a_constant, names_a_constant_as_the_loaders, gives_away_its_restore,
    gives_away_its_save, serves_its_restore, serves_its_save, saves_when_it_is_loaded, calls_its_save, fills_its_table_from_a_constant,
    fills_its_table_from_an_input, fills_its_table_from_what_is_no_asset, has_an_asset_elsewhere, has_an_absolute_asset,
    assigns_its_assets_name, has_another_handle_of_its_assets_name,
]  # fmt: skip


@pytest.mark.parametrize("forge", FORGED, ids=lambda forge: forge.__name__)
def test_forged_savers_and_tables_are_refused(words: Path, forge: Forge) -> None:
    model = read(words)
    vet(read(words))
    forge(model)
    with pytest.raises(
        CodeNotAllowed, match=r"SaveV2|RestoreV2|InitializeTableFromTextFileV2|asset outside of its folder"
    ):
        vet(model)


def reads_a_path_as_default(model: Any) -> None:
    next(each for each in model.meta_graphs[0].graph_def.node if each.name == "save/filename/input").attr[
        "value"
    ].tensor.string_val[0] = b"/var/other/variables"


def serves_what_fills_its_table(model: Any) -> None:
    """Then nobody feeds the asset's path, and the value in the graph is read."""
    nodes = model.meta_graphs[0].graph_def.node
    next(each for each in nodes if each.name == "mul").input.append(
        "^" + node(nodes, "InitializeTableFromTextFileV2").name
    )


def names_no_asset(model: Any) -> None:
    del model.meta_graphs[0].collection_def["saved_model_assets"]


def has_an_old_asset_elsewhere(model: Any) -> None:
    from tensorflow.core.protobuf.meta_graph_pb2 import AssetFileDef

    assets = model.meta_graphs[0].collection_def["saved_model_assets"].any_list.value
    assets[0].Pack(AssetFileDef(filename="/etc/passwd"))


@pytest.mark.parametrize(
    "forge",
    [reads_a_path_as_default, serves_what_fills_its_table, names_no_asset, has_an_old_asset_elsewhere, serves_its_save],
)
def test_forged_graphs_of_version_1_are_refused(old: Path, forge: Forge) -> None:
    model = read(old)
    vet(read(old))
    forge(model)
    with pytest.raises(CodeNotAllowed, match=r"SaveV2|RestoreV2|InitializeTableFromTextFileV2|asset outside"):
        vet(model)


def test_every_operation_that_is_not_listed_is_refused_by_name_wherever_it_stands(tmp_path: Path) -> None:
    """All operations that TensorFlow registers, one by one: in the graph, in a served function, and in one that nothing calls."""
    import tensorflow as tf
    from tensorflow.core.framework.op_def_pb2 import OpList
    from tensorflow.python.client import pywrap_tf_session

    from node.engine.operations import ALLOWED, PYTHON

    names = {
        each.name for each in OpList.FromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList())).op
    }
    model = vet(read(saved(tmp_path / "m", lambda x: {"y": 2 * x}, tf.TensorSpec((None, 2), tf.float32, name="x"))))
    graph = model.meta_graphs[0].graph_def
    graph.library.function.add().signature.name = "lonely"
    for name in sorted(names - ALLOWED - PYTHON - {"SaveV2", "MergeV2Checkpoints"}):
        for nodes in (graph.node, graph.library.function[0].node_def, graph.library.function[-1].node_def):
            nodes.add(name="evil", op=name)
            with pytest.raises(CodeNotAllowed, match=rf"\({name} in its (graph|function '[^']+')\)"):
                vet(model)
            del nodes[-1]
    vet(model)


def test_operations_and_functions_that_nobody_has_are_refused_by_name(words: Path) -> None:
    model = read(words)
    model.meta_graphs[0].graph_def.node.add(name="own", op="WhitespaceTokenize")
    with pytest.raises(InvalidModel, match=r"TensorFlow does not have \(WhitespaceTokenize in its graph\)"):
        vet(model)
    model = read(words)
    call = model.meta_graphs[0].graph_def.node.add(name="call", op="PartitionedCall")
    call.attr["f"].func.name = "WriteFile"
    with pytest.raises(InvalidModel, match="calls 'WriteFile', which it does not have"):
        vet(model)


def test_a_function_does_not_hide_an_operation_by_its_name(words: Path) -> None:
    model = read(words)
    graph = model.meta_graphs[0].graph_def
    graph.library.function.add().signature.name = "WriteFile"
    graph.node.add(name="call", op="WriteFile")
    with pytest.raises(CodeNotAllowed, match="WriteFile in its graph"):
        vet(model)


@pytest.mark.parametrize("place", ["node", "function"])
def test_two_of_one_name_are_refused(words: Path, place: str) -> None:
    """We need not guess which of them TensorFlow takes."""
    model = read(words)
    graph = model.meta_graphs[0].graph_def
    several = graph.node if place == "node" else graph.library.function
    several.append(several[0])
    with pytest.raises(InvalidModel, match=r"not unique|the same name"):
        vet(model)


def test_who_trusts_models_may_let_them_do_anything(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from node.engine import code

    monkeypatch.setattr(code, "_allowed", ("lambda",))
    model = read(words)
    model.meta_graphs[0].graph_def.node.add(name="evil", op="WriteFile")
    assert operations(vet(model)) >= {"WriteFile", "SaveV2"}
