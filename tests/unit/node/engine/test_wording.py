"""Errors of other libraries, in words for people."""

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


USER_CODE = """in user code:

    File "/opt/potluck/lib/python3.11/site-packages/node/engine/loaded.py", line 151, in _evaluate_step  *
        model.compute_metrics(x, target, outputs, sample_weight=weights)
    File "/opt/potluck/lib/python3.11/site-packages/keras/src/metrics/f_score_metrics.py", line 153, in update_state  **
        raise ValueError(

    ValueError: FBetaScore expects 2D inputs with shape (batch_size, output_dim).

    Received: (64,)
"""


def test_of_an_error_in_a_models_code_the_reason_is_told_and_not_the_place() -> None:
    reason = "ValueError: FBetaScore expects 2D inputs with shape (batch_size, output_dim). Received: (64,)"
    assert one_line(USER_CODE, 100) == reason


def test_others_are_one_line_and_keep_their_end() -> None:
    assert one_line("a\n  b\x1b[1mc\x1b[0m") == "a bc"
    assert one_line("x" * 300) == "x" * 300
    called = "Exception encountered when calling Odd.call(). the reason Arguments received by Odd.call(): • inputs="
    assert one_line(called, 120) == called
    assert one_line(called, 100) == called.partition(" Arguments")[0]
    assert one_line("begin " + "x" * 400 + " the reason") == "begin " + "x" * 94 + " ... " + "x" * 189 + " the reason"
