"""Checks what a SavedModel's graphs may do, before TensorFlow sees them.

TensorFlow runs more than the served signature: it also makes and fills tables, and loads variables. So every operation of every graph
and function must be on the list in `operations`. Three more kinds of operations are allowed, but only where a SavedModel needs them:

- Operations that write its checkpoint are cut out, with all nodes that need them. If a served node needs one, the model is refused.
- Operations that read its checkpoint must take the file's name from TensorFlow's loader. No node that is served, or that initializes the
  model, may need them.
- Operations that fill a table from a file must take the file's name from an asset, a file in the SavedModel's own folder.

It looks once at each node, and walks back from the names of files to where they come from. So time and memory grow with the size of
`saved_model.pb`, which TensorFlow then copies anyway. It does not read weights, which are in other files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from tensorflow.core.protobuf.meta_graph_pb2 import AssetFileDef

from node.engine import code, tensorflow_parts
from node.engine.operations import ALLOWED, FILLS_TABLE, PYTHON, READS_CHECKPOINT, WRITES_CHECKPOINTS
from potluck.errors import CodeNotAllowed, InvalidModel

INIT = ("saved_model_main_op", "legacy_init_op", "table_initializer")
"""The collections whose operations TensorFlow runs when it loads a model of version 1."""
ASSETS = "saved_model_assets"
INIT_SIGNATURE = "__saved_model_init_op"
CALLS = ("PartitionedCall", "StatefulPartitionedCall")
OF_VARIABLES = ("AssignVariableOp", "ReadVariableOp", "VarIsInitializedOp")
NAMED_AT_MOST = 5
ADVICE = 'or let nodes run any code that models bring ("lambda" in allow_code of their configuration)'


def vet(saved: Any) -> bool:
    """Check a SavedModel (the protobuf), and cut out operations that write checkpoints. Returns whether it had any.

    Raises CodeNotAllowed, and InvalidModel for a model that could run on no node.
    """
    bodies = [body for meta in saved.meta_graphs for body in _bodies(meta.graph_def)]
    found = sorted({node.op for body in bodies for node in body.nodes.values()} & PYTHON)
    if found:
        raise InvalidModel(
            f"the SavedModel calls Python ({', '.join(found)}), and a SavedModel does not hold Python: save it without "
            "tf.py_function and tf.numpy_function"
        )
    if not code.safe_mode():
        return False
    cut = [_Vetting(meta).run() for meta in saved.meta_graphs]
    return any(cut)


class _Body:
    """The nodes of a function, by name; or those of the graph around the functions (then its `name` is empty)."""

    def __init__(self, name: str, nodes: Iterable[Any], arguments: Iterable[Any] = ()) -> None:
        listed, taken = list(nodes), list(arguments)
        self.name = name
        self.nodes = {node.name: node for node in listed}
        self.arguments = {argument.name: place for place, argument in enumerate(taken)}
        self._sources: dict[str, Any] = {}
        """What `source` has found: nodes that many others come from are followed once."""
        lists = any(argument.number_attr or argument.type_list_attr for argument in taken)
        if lists or len(self.nodes.keys() | self.arguments.keys()) < len(listed) + len(taken):
            raise InvalidModel(
                f"the SavedModel is damaged: {self.place}, names are not unique, or an argument is a list: save it again"
            )

    @property
    def place(self) -> str:
        return f"in its function '{self.name[:100]}'" if self.name else "in its graph"

    def source(self, tensor: str) -> Any:
        """Where a tensor comes from: an argument (its position), or a node; None: nothing has this name."""
        passed: list[str] = []
        found: Any = None
        while (name := tensor.partition(":")[0]) not in self._sources:
            self._sources[name] = None  # where the nodes form a circle, it stays so
            passed.append(name)
            if name in self.arguments:
                found = self.arguments[name]
                break
            node = self.nodes.get(name)
            if node is None or node.op != "Identity" or not node.input:
                found = node
                break
            tensor = node.input[0]
        else:
            found = self._sources[name]
        self._sources.update(dict.fromkeys(passed, found))
        return found

    def after(self, starts: Iterable[str]) -> set[str]:
        """The names of these nodes, and of all nodes that need them."""
        users = defaultdict(list)
        for node in self.nodes.values():
            for tensor in node.input:
                users[tensor.lstrip("^").partition(":")[0]].append(node.name)
        return _closure(starts, users)


class _Vetting:
    """The check of one meta graph."""

    def __init__(self, meta: Any) -> None:
        self._meta = meta
        self._graph, *functions = _bodies(meta.graph_def)
        self._functions = {body.name: body for body in functions}
        if len(self._functions) < len(functions):
            raise InvalidModel("the SavedModel is damaged: two functions have the same name: save it again")
        self._callers: dict[str, list[tuple[_Body, Any]]] = defaultdict(list)
        for body in (self._graph, *functions):
            for node in body.nodes.values():
                for name in self._called(node, body):
                    self._callers[name].append((body, node))
        signatures = meta.signature_def.items()
        self._served = {name for key, each in signatures if key != INIT_SIGNATURE for name in _tensors(each)}
        self._loading = {name for key, each in signatures if key == INIT_SIGNATURE for name in _tensors(each)}
        for key in INIT:
            if key in meta.collection_def:
                self._loading.update(map(_node_name, meta.collection_def[key].node_list.value))
        self._known: dict[tuple[str, str], bool] = {}
        """Answers about nodes of the graph, by question and name."""
        self._assets = {_node_name(asset.tensor_info.name) for asset in _assets(meta)}

    def run(self) -> bool:
        """Check it, as `vet` does. Returns whether it had operations that write checkpoints."""
        for asset in _assets(self._meta):
            path = PurePosixPath(asset.filename)
            if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in asset.filename:
                raise CodeNotAllowed(f"the SavedModel has an asset outside of its folder: {asset.filename[:100]!r}")
        cut = self._cut_writers()
        self._check_operations()
        self._check_files({READS_CHECKPOINT}, self._served | self._loading, objects=False)
        self._check_files(FILLS_TABLE, self._served, objects=True)
        return cut

    def _called(self, node: Any, body: _Body) -> Iterator[str]:
        """The functions that a node names. Raises InvalidModel if the model lacks one."""
        for name in _function_names(node.attr.values()):
            if name not in self._functions:
                raise InvalidModel(
                    f"the SavedModel is damaged: its operation {node.op} {body.place} calls '{name[:100]}', which it does not have"
                )
            yield name
        if self._is_call(node):
            yield node.op

    def _is_call(self, node: Any) -> bool:
        """Whether its operation is a function of the model. If TensorFlow has an operation of that name, it is not."""
        return node.op in self._functions and not tensorflow_parts.is_operation(node.op)

    def _check_operations(self) -> None:
        refused: dict[str, str] = {}
        special = FILLS_TABLE | {READS_CHECKPOINT}
        for body in (self._graph, *self._functions.values()):
            for node in body.nodes.values():
                if node.op not in ALLOWED and node.op not in special and not self._is_call(node):
                    refused.setdefault(node.op, body.place)
        unknown = [name for name in refused if not tensorflow_parts.is_operation(name)]
        if unknown:
            raise InvalidModel(
                f"the SavedModel has operations that TensorFlow does not have ({_shown(refused, unknown)}), and a SavedModel does not "
                "hold them: save it with only operations of TensorFlow"
            )
        if refused:
            raise CodeNotAllowed(
                "the SavedModel has operations that may reach beyond the model, such as to files of the machine it runs on "
                f"({_shown(refused, refused)}), and nodes do not allow that: save it without them, {ADVICE}"
            )

    def _holding(self, operations: Iterable[str]) -> tuple[set[str], set[str]]:
        """(Functions, nodes of the graph) that have one of these operations, or call a function that has one."""
        wanted, users = set(operations), defaultdict(list)
        for name, callers in self._callers.items():
            users[name] = [body.name for body, _ in callers if body.name]
        direct = [name for name, body in self._functions.items() if _has(body, wanted)]
        functions = _closure(direct, users)
        nodes = {node.name for node in self._graph.nodes.values() if node.op in wanted}
        nodes.update(node.name for name in functions for body, node in self._callers[name] if not body.name)
        return functions, nodes

    def _cut_writers(self) -> bool:
        functions, nodes = self._holding(WRITES_CHECKPOINTS)
        if not functions and not nodes:
            return False
        gone = self._graph.after(nodes)
        needed = self._served | self._loading | {_node_name(self._meta.saver_def.restore_op_name)}
        objects = functions & set(self._meta.object_graph_def.concrete_functions)
        if gone & needed or objects:
            self._refuse(WRITES_CHECKPOINTS, functions)
        graph = self._meta.graph_def
        for name in gone:
            del self._graph.nodes[name]
        for name in functions:
            del self._functions[name]
        for callers in self._callers.values():
            callers[:] = [
                (body, node)
                for body, node in callers
                if (body.name not in functions if body.name else node.name not in gone)
            ]
        _drop(graph.node, lambda node: node.name in gone)
        _drop(graph.library.function, lambda function: function.signature.name in functions)
        _drop(graph.library.gradient, lambda each: {each.function_name, each.gradient_func} & functions)
        _drop(graph.library.registered_gradients, lambda each: each.gradient_func in functions)
        return True

    def _check_files(self, operations: Iterable[str], kept_from: set[str], *, objects: bool) -> None:
        """Check that operations which read files take the names from where they may, and that no node in `kept_from` needs them.

        `objects`: whether the model's public functions may have such operations, if the name is an asset bound to the function.
        """
        wanted = set(operations)
        functions, nodes = self._holding(wanted)
        given = self._meta.object_graph_def.concrete_functions
        if self._graph.after(nodes) & kept_from or (not objects and functions & set(given)):
            self._refuse(wanted, functions)
        asset = READS_CHECKPOINT not in wanted
        names = [
            (body, node.input[1 if asset else 0] if len(node.input) > asset else "")
            for body in (self._graph, *self._functions.values())
            for node in body.nodes.values()
            if node.op in wanted
        ]
        seen = set()
        while names:
            body, tensor = names.pop()
            source = body.source(tensor)
            if not isinstance(source, int):
                if body.name or not (self._is_asset(source) if asset else self._is_prefix(source)):
                    self._refuse(wanted, functions)
                continue
            if (body.name, source) in seen:
                continue
            seen.add((body.name, source))
            if body.name in given and not self._bound_to_asset(body, source):
                self._refuse(wanted, functions)
            for caller, node in self._callers[body.name]:
                inputs = [each for each in node.input if not each.startswith("^")]
                plain = node.op in CALLS or node.op == body.name
                names.append((caller, inputs[source] if plain and source < len(inputs) else ""))

    def _bound_to_asset(self, body: _Body, place: int) -> bool:
        """Whether an asset is bound to this argument of a public function. Bound inputs are the last arguments."""
        graph = self._meta.object_graph_def
        bound = graph.concrete_functions[body.name].bound_inputs
        place -= len(body.arguments) - len(bound)
        if place < 0 or not 0 <= bound[place] < len(graph.nodes):
            return False
        node = graph.nodes[bound[place]]
        return bool(node.WhichOneof("kind") == "asset" and not node.registered_name)

    def _is_prefix(self, node: Any) -> bool:
        """Whether TensorFlow's loader puts the name of the variables' files into this node."""
        return node is not None and self._once("prefix", node, self._reads_prefix)

    def _once(self, question: str, node: Any, answer: Callable[[Any], bool]) -> bool:
        key = question, node.name
        if key not in self._known:
            self._known[key] = answer(node)
        return self._known[key]

    def _reads_prefix(self, node: Any) -> bool:
        if node.name != _node_name(self._meta.saver_def.filename_tensor_name):
            return False
        for _ in range(len(self._graph.nodes)):
            if node is None or node.op != "PlaceholderWithDefault" or not node.input:
                break
            node = self._graph.source(node.input[0])
        if node is None or node.op == "Placeholder":
            return node is not None
        return node.op == "Const" and not any(b"/" in text for text in node.attr["value"].tensor.string_val)

    def _is_asset(self, node: Any) -> bool:
        """Whether TensorFlow's loader puts the path of an asset into this node, or it reads a variable that only gets such paths."""
        if node is None:
            return False
        if node.op != "ReadVariableOp":
            return node.name in self._assets and node.op in ("Const", "Placeholder", "PlaceholderWithDefault")
        handle = self._graph.source(node.input[0]) if node.input else None
        return handle is not None and handle.op == "VarHandleOp" and self._once("asset", handle, self._holds_asset)

    def _holds_asset(self, handle: Any) -> bool:
        """Whether this variable gets only paths of assets."""
        others = any(other is not handle for name in _variables(handle) for other in self._handles[name])
        users = self._users[handle.name]
        values = [self._graph.source(user.input[-1]) for user in users if user.op == "AssignVariableOp"]
        return (
            not others
            and all(user.op in OF_VARIABLES for user in users)
            and all(value is not None and value.op != "ReadVariableOp" and self._is_asset(value) for value in values)
        )

    @cached_property
    def _handles(self) -> dict[str, list[Any]]:
        """The nodes that are handles of variables, by each name that such a node gives its variable."""
        found = defaultdict(list)
        for body in (self._graph, *self._functions.values()):
            for node in body.nodes.values():
                if "VarHandle" in node.op:
                    for name in _variables(node):
                        found[name].append(node)
        return found

    @cached_property
    def _users(self) -> dict[str, list[Any]]:
        """The nodes of the graph by each node that they take something from."""
        found = defaultdict(list)
        for node in self._graph.nodes.values():
            for name in set(map(_node_name, node.input)):
                found[name].append(node)
        return found

    def _refuse(self, operations: Iterable[str], functions: Iterable[str]) -> None:
        wanted, named = set(operations), set(functions)
        bodies = [self._functions[name] for name in named & set(self._meta.object_graph_def.concrete_functions)]
        if not any(_has(body, wanted) for body in bodies):  # no public function has them: name those of all
            bodies = [self._graph, *(self._functions[name] for name in named)]
        found = {node.op: body.place for body in bodies for node in body.nodes.values() if node.op in wanted}
        allowed = "assets of its own" if wanted & FILLS_TABLE else "its own variables, when it is loaded"
        raise CodeNotAllowed(
            f"the SavedModel reads or writes files of the machine it runs on ({_shown(found, found)}) that are not {allowed}, "
            f"and nodes do not allow that: save it without them, {ADVICE}"
        )


def _bodies(graph: Any) -> list[_Body]:
    """The graph itself, and then its functions."""
    functions = [_Body(each.signature.name, each.node_def, each.signature.input_arg) for each in graph.library.function]
    if not all(body.name for body in functions):
        raise InvalidModel("the SavedModel is damaged: it has a function without a name: save it again")
    return [_Body("", graph.node), *functions]


def _assets(meta: Any) -> list[Any]:
    """The assets, each with its file and its node. Models of version 1 may have them only in a collection."""
    if meta.asset_file_def or ASSETS not in meta.collection_def:
        return list(meta.asset_file_def)
    found = []
    for each in meta.collection_def[ASSETS].any_list.value:
        asset = AssetFileDef()
        if not each.Unpack(asset):
            raise InvalidModel("the SavedModel is damaged: its list of assets has something else in it: save it again")
        found.append(asset)
    return found


def _function_names(attributes: Iterable[Any]) -> Iterator[str]:
    for attribute in attributes:
        for function in (*([attribute.func] if attribute.HasField("func") else ()), *attribute.list.func):
            yield function.name
            yield from _function_names(function.attr.values())


def _tensors(signature: Any) -> Iterator[str]:
    """The names of the nodes that are the inputs and outputs of a signature."""
    infos = [*signature.inputs.values(), *signature.outputs.values()]
    while infos:
        info = infos.pop()
        infos.extend(info.composite_tensor.components)
        sparse = info.coo_sparse
        names = info.name, sparse.values_tensor_name, sparse.indices_tensor_name, sparse.dense_shape_tensor_name
        yield from (_node_name(name) for name in names if name)


def _node_name(tensor: str) -> str:
    return tensor.lstrip("^").partition(":")[0]


def _variables(handle: Any) -> set[str]:
    """The names by which a handle of a variable may mean the same variable as another."""
    return {handle.name, handle.attr["shared_name"].s.decode(errors="replace")} - {""}


def _has(body: _Body, operations: set[str]) -> bool:
    return any(node.op in operations for node in body.nodes.values())


def _closure(starts: Iterable[str], users: dict[str, list[str]]) -> set[str]:
    found, ahead = set(starts), list(starts)
    while ahead:
        new = [name for name in users[ahead.pop()] if name not in found]
        found.update(new)
        ahead.extend(new)
    return found


def _drop(messages: Any, gone: Any) -> None:
    """Delete messages in place: a copy of the rest would hold large constants twice."""
    for place in reversed(range(len(messages))):
        if gone(messages[place]):
            del messages[place]


def _shown(places: dict[str, str], names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f", and {len(listed) - NAMED_AT_MOST} more" if len(listed) > NAMED_AT_MOST else ""
    return ", ".join(f"{name[:100]} {places[name]}" for name in listed[:NAMED_AT_MOST]) + more
