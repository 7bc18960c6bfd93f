"""Errors of others, told to a person."""

from node.engine.wording import one_line

GRAPH = """Graph execution error:

Detected at node sequential_1/embedding_1/GatherV2 defined at (most recent call last):
  File "threading.py", line 1002, in _bootstrap

  File "numpy.py", line 1, in take

Node: 'sequential_1/embedding_1/GatherV2'
indices[0,3] = 600 is not in [0, 500)
\t [[{{node sequential_1/embedding_1/GatherV2}}]] [Op:__inference_predict_1]"""


def test_of_an_error_in_a_graph_what_is_wrong_is_told() -> None:
    assert one_line(GRAPH) == "indices[0,3] = 600 is not in [0, 500)"
    assert one_line(GRAPH.replace("\n\t [[", "\n(0) more\n\t [[")) == "indices[0,3] = 600 is not in [0, 500) (0) more"
    without_node = GRAPH.replace("Node: 'sequential_1/embedding_1/GatherV2'\n", "")
    assert one_line(without_node) == "indices[0,3] = 600 is not in [0, 500)"


def test_nodes_of_a_graph_are_not_told() -> None:
    direct = "{{function_node __inference_call_12_}} indices[0,0] = 107 is not in [0, 10)\n\t [[{{node m/GatherV2}}]] [Op:__inference_call_12]"
    assert one_line(direct) == "indices[0,0] = 107 is not in [0, 10)"
    eager = (
        "{{function_node __wrapped__MatMul_device_/CPU:0}} Matrix size-incompatible: In[0]: [1,2] [Op:MatMul] name: "
    )
    assert one_line(eager) == "Matrix size-incompatible: In[0]: [1,2]"
    assert one_line("shapes [[1], [2]] and {a: 1}") == "shapes [[1], [2]] and {a: 1}"


def test_others_are_one_line_and_cut() -> None:
    assert one_line("a\n  b\x1b[1mc\x1b[0m") == "a bc"
    assert one_line("x" * 400) == "x" * 300 + "..."
