"""The importer against ONNX Runtime on random graphs, and the text of its refusals."""
import numpy as np
import onnx
from onnx import TensorProto, helper
import onnxruntime
import pytest

from compress import graph as graphs
from compress import onnx_import
from sim_tests.compress.networks import every_layer_kind
from sim_tests.compress.onnx_models import Builder, random_model
from spec.errors import InputError


def runtime(model, x):
    """Output of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def ours(model, x):
    """(graph, output in the model's own layout)."""
    graph = onnx_import.parse(model.SerializeToString())
    y = graphs.to_nchw(graphs.forward(graph, graphs.to_nhwc(x, graph.shapes[graph.input])))
    return graph, y.reshape(len(y), -1) if graph.flat_output else y


def agree(model, shape, rng):
    x = rng.normal(0, 1, (3, *shape)).astype(np.float32)
    graph, y = ours(model, x)
    expected = runtime(model, x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=2e-4, atol=2e-5 * max(1, np.abs(expected).max()))
    return graph


@pytest.mark.parametrize("seed", range(60))
def test_random_graph_equals_onnx_runtime(seed):
    rng = np.random.default_rng([2024, seed])
    model, shape = random_model(rng)
    agree(model, shape, rng)


def test_residual_block_is_fused_into_the_last_convolution():
    rng = np.random.default_rng(1)
    b = Builder((4, 6, 6))
    first = b.node("Relu", b.batch_norm(rng, b.conv(rng, "x", 4, 8, pads=[1] * 4), 8))
    second = b.batch_norm(rng, b.conv(rng, first, 8, 8, pads=[1] * 4), 8)
    y = b.node("Relu", b.node("Add", second, first))
    graph = agree(b.model(y), (4, 6, 6), rng)
    assert [type(n).__name__ for n in graph.nodes] == ["Conv", "Conv"]
    assert graph.nodes[1].residual == graph.nodes[0].output and graph.nodes[1].low == 0


def test_sum_of_two_convolutions_fuses_the_later_one():
    rng = np.random.default_rng(2)
    b = Builder((3, 5, 5))
    short, main = b.conv(rng, "x", 3, 6, 1), b.conv(rng, "x", 3, 6, 3, pads=[1] * 4)
    graph = agree(b.model(b.node("Add", short, main)), (3, 5, 5), rng)
    assert len(graph.nodes) == 2 and graph.nodes[1].residual == graph.nodes[0].output
    assert [n.weights.shape[1] for n in graph.nodes] == [1, 3], "the later convolution takes the sum"


@pytest.mark.parametrize("size", [7, 8, 9, 10, 11])
@pytest.mark.parametrize("pads", [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_ceil_mode_never_begins_a_window_in_the_padding(size, pads):
    rng = np.random.default_rng(12)
    b = Builder((2, size, size))
    y = b.node("MaxPool", "x", kernel_shape=[2, 3], strides=[2, 2], pads=pads, ceil_mode=1)
    agree(b.model(y, check=False), (2, size, size), rng)        # ONNX's own shape inference is wrong here before 22


def test_sum_of_pools_stays_an_addition():
    rng = np.random.default_rng(3)
    b = Builder((3, 6, 6))
    pools = [b.node(op, "x", kernel_shape=[2, 2]) for op in ("MaxPool", "AveragePool")]
    graph = agree(b.model(b.node("Relu", b.node("Add", *pools))), (3, 6, 6), rng)
    assert [type(n).__name__ for n in graph.nodes] == ["Pool", "Pool", "Add"] and graph.nodes[2].low == 0


def test_activation_of_a_shared_tensor_becomes_its_own_layer():
    rng = np.random.default_rng(4)
    b = Builder((3, 5, 5))
    shared = b.conv(rng, "x", 3, 4, 1)
    graph = agree(b.model(b.node("Add", b.node("Relu", shared), shared)), (3, 5, 5), rng)
    assert any("depthwise" in note for note in graph.notes)


def test_clips_compose():
    rng = np.random.default_rng(5)
    for limits in ([(0, 6), (1, 2)], [(-1, 1), (0, 6)], [(2, 3), (0, 1)], [(0, 1), (2, 3)]):
        b = Builder((2, 4, 4))
        y = b.conv(rng, "x", 2, 3, 1)
        for low, high in limits:
            y = b.node("Clip", y, np.float32(low), np.float32(high))
        assert len(agree(b.model(y), (2, 4, 4), rng).nodes) == 1


def test_flatten_keeps_channel_order():
    rng = np.random.default_rng(6)
    b = Builder((3, 4, 5))
    y = b.node("Gemm", b.node("Flatten", "x"), rng.normal(0, 1, (60, 7)), rng.normal(0, 1, 7), alpha=0.5, beta=2.0)
    graph = agree(b.model(y), (3, 4, 5), rng)
    assert graph.nodes[0].weights.shape == (7, 4, 5, 3)


def test_softmax_at_the_end_is_dropped_with_a_note():
    rng = np.random.default_rng(7)
    b = Builder((8,))
    y = b.node("Gemm", "x", rng.normal(0, 1, (8, 5)), rng.normal(0, 1, 5))
    graph = onnx_import.parse(b.model(b.node("Softmax", y)).SerializeToString())
    assert len(graph.nodes) == 1 and "Softmax" in graph.notes[0] and graph.flat_input


def test_constants_identity_and_dropout_vanish():
    rng = np.random.default_rng(8)
    b = Builder((2, 4, 4))
    y = b.node("Dropout", b.node("Identity", b.conv(rng, "x", 2, 3)))
    value = helper.make_tensor("v", TensorProto.FLOAT, [1, 3, 1, 1], [1.0, 2.0, 3.0])
    y = b.node("Add", y, b.node("Constant", value=value))
    assert len(agree(b.model(y), (2, 4, 4), rng).nodes) == 1


def test_dead_operators_are_left_out():
    rng = np.random.default_rng(9)
    b = Builder((2, 4, 4))
    y = b.conv(rng, "x", 2, 3)
    b.node("Relu", y)
    graph = agree(b.model(y), (2, 4, 4), rng)
    assert len(graph.nodes) == 1 and graph.nodes[0].low is None and "left out" in graph.notes[0]


def conv_model(**attributes):
    """One convolution 4 -> 6, 3 x 3, on 8 x 8, with the given attributes, unchecked."""
    b = Builder((4, 8, 8))
    w = np.random.default_rng(0).normal(0, 1, (6, attributes.pop("depth", 4), 3, 3))
    return b.model(b.node("Conv", "x", w, **attributes), check=False)


def pool_model(op="AveragePool", **attributes):
    b = Builder((4, 8, 8))
    return b.model(b.node(op, "x", **attributes), check=False)


def op_model(op, *inputs, **attributes):
    b = Builder((4, 8, 8))
    return b.model(b.node(op, *inputs, **attributes), check=False)


REFUSALS = [
    (conv_model(group=0), "group must be in 1..65536, not 0"),
    (conv_model(group=2), "group must divide 4 input and 6 output channels and match the weight's 4 channels, not 2"),
    (conv_model(group=3, depth=1), "group must divide 4 input"),
    (conv_model(strides=[0, 1]), "strides must be in 1..65536, not 0"),
    (conv_model(strides=[1]), "strides must have 2 elements"),
    (conv_model(strides=1.5), "strides must be of type INTS"),
    (conv_model(dilations=[0, 1]), "dilations must be in 1..1024, not 0"),
    (conv_model(pads=[-1, 0, 0, 0]), "pads must be in 0..1023, not -1"),
    (conv_model(pads=[1 << 40, 0, 0, 0]), "pads must be in 0..1023"),
    (conv_model(pads=[3, 0, 0, 0]), "pads must be smaller than the window"),
    (conv_model(pads=[1, 1, 1, 1], auto_pad="SAME_UPPER"), "must not have both pads and auto_pad"),
    (conv_model(auto_pad="SOMEHOW"), "auto_pad must be NOTSET, VALID, SAME_UPPER or SAME_LOWER, not 'SOMEHOW'"),
    (conv_model(kernel_shape=[5, 3]), "kernel_shape must equal the weight's [3, 3]"),
    (conv_model(dilations=[5, 1]), "window of 11 must fit the padded input of 8"),
    (conv_model(colour=3), "attribute 'colour' is not supported"),
    (pool_model(kernel_shape=[3, 3], pads=[1] * 4), "must have count_include_pad = 1"),
    (pool_model(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), "ceil_mode must be 0 where it adds"),
    (pool_model("MaxPool"), "kernel_shape must be given"),
    (pool_model("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]), "dilations must be 1"),
    (pool_model("MaxPool", kernel_shape=[9, 2]), "window of 9 must fit"),
    (op_model("Sigmoid", "x"), "(Sigmoid) operator is not supported; supported: Add, AveragePool"),
    (op_model("Transpose", "x", perm=[0, 2, 3, 1]), "(Transpose) operator is not supported"),
    (op_model("Softmax", "x"), "must run along the classes"),
    (op_model("Add", "x", "y"), "reads 'y', which no earlier node makes"),
    (op_model("Add", "x", np.ones((8, 8))), "must be one value or one for each of 4 channels, not (8, 8)"),
    (op_model("Mul", "x", "x"), "one factor must be a constant, not 'x'"),
    (op_model("Clip", "x", np.float32(2), np.float32(1)), "lower limit must be below the upper one"),
    (op_model("Flatten", "x", axis=2), "axis must be 1"),
    (op_model("Reshape", "x", np.array([8, -1, 4, 8])), "must flatten to [batch, 256] or keep [batch, 4, 8, 8]"),
    (op_model("MatMul", "x", np.ones((8, 8))), "must have rank 2"),
    (op_model("Conv", "x", np.full((2, 4, 1, 1), np.nan)), "must be finite (NaN or infinity found)"),
    (op_model("Conv", "x", np.full((2, 4, 1, 1), np.inf)), "must be finite (NaN or infinity found)"),
    (op_model("Conv", "x", np.full((2, 4, 1, 1), 1e30)), "must not exceed 1e+12"),
    (op_model("Conv", "x", np.ones((2, 4, 1, 1)), np.ones(3)), "bias must have 2 elements"),
    (op_model("BatchNormalization", "x", *[np.ones(4)] * 3, -np.ones(4)), "variance + epsilon must be above 0"),
    (op_model("BatchNormalization", "x", *[np.ones(3)] * 4), "parameters must have 4 elements"),
    (op_model("Identity", "x"), "must have at least one layer"),
]


@pytest.mark.parametrize("model,text", REFUSALS, ids=[text[:40] for _, text in REFUSALS])
def test_refusal(model, text):
    with pytest.raises(InputError) as caught:
        onnx_import.parse(model.SerializeToString())
    assert text in str(caught.value) and "\n" not in str(caught.value)


def mutated(change):
    b = Builder((4, 8, 8))
    model = b.model(b.conv(np.random.default_rng(0), "x", 4, 6))
    change(model)
    return model


def _external(model):
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location="../w")


MUTATIONS = [
    (lambda m: m.opset_import.append(helper.make_opsetid("", 17)), "must not repeat an operator set"),
    (lambda m: setattr(m.opset_import[0], "version", 9999), "must be in 7..28, not 9999"),
    (lambda m: m.ClearField("opset_import"), "must be in 7..28, not 0"),
    (lambda m: setattr(m, "ir_version", -1), "ir_version must be in 3..64"),
    (lambda m: m.ClearField("graph"), "must contain a graph with nodes"),
    (lambda m: m.graph.ClearField("output"), "one input and one output"),
    (lambda m: m.graph.input.append(helper.make_tensor_value_info("z", 1, [1])), "one input and one output"),
    (lambda m: setattr(m.graph.output[0], "name", "nowhere"), "must be made by a node"),
    (_external, "external data are not read"),
    (lambda m: setattr(m.graph.initializer[0], "raw_data", m.graph.initializer[0].raw_data + b"1234"),
     "must hold exactly the 216 elements of its shape [6, 4, 3, 3], not 217"),
    (lambda m: setattr(m.graph.initializer[0], "raw_data", b"123"), "must hold exactly the 216 elements"),
    (lambda m: m.graph.initializer[0].dims.__setitem__(0, -1), "must have at most 5 dimensions in 0.."),
    (lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 26), "must have at most 67108864 elements"),
    (lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 62), "must have at most 5 dimensions in 0.."),
    (lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.STRING), "must be FLOAT, DOUBLE"),
    (lambda m: setattr(m.graph.initializer[0], "data_type", 77), "must be FLOAT, DOUBLE"),
    (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "must be defined once"),
    (lambda m: m.graph.node.append(m.graph.node[0]), "must be defined once"),
    (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_param", "H"),
     "dimension 2 must be a number; only the batch may be symbolic"),
    (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", -1), "dimension 2 must be in 1.."),
    (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 1 << 40), "dimension 2 must be in"),
    (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 0), "batch size must be"),
    (lambda m: [setattr(m.graph.input[0].type.tensor_type.shape.dim[i], "dim_value", 60000) for i in (2, 3)], ""),
    (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT8), "must be a FLOAT tensor"),
    (lambda m: m.graph.input[0].type.tensor_type.shape.dim.pop(), "must have shape [N, C, H, W] or"),
    (lambda m: setattr(m.graph.node[0], "domain", "com.example"), "operator is not supported"),
    (lambda m: m.graph.node[0].attribute.append(m.graph.node[0].attribute[0]), "must not repeat attribute"),
    (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("body", m.graph)), "must not use subgraphs"),
    (lambda m: m.functions.append(onnx.FunctionProto(name="f")), "must not hold functions"),
    (lambda m: m.graph.node[0].input.__setitem__(0, m.graph.node[0].output[0]), "which no earlier node makes"),
    (lambda m: m.graph.node[0].output.append("second"), "must have one output"),
]


@pytest.mark.parametrize("index", range(len(MUTATIONS)))
def test_malformed_model(index):
    change, text = MUTATIONS[index]
    with pytest.raises(InputError) as caught:
        onnx_import.parse(mutated(change).SerializeToString())
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_two_files_joined_are_refused():
    data = mutated(lambda m: None).SerializeToString()
    with pytest.raises(InputError, match="two files joined"):
        onnx_import.parse(data + data)


@pytest.mark.parametrize("content,text", [(b"", "must not be an empty file"), (b"hello world", "must be an ONNX model"),
                                          (b"\x08", "must be an ONNX model")])
def test_unreadable_file_names_itself(tmp_path, content, text):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=text) as caught:
        onnx_import.load(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused_or_complete():
    data = mutated(lambda m: None).SerializeToString()
    for length in range(len(data)):
        with pytest.raises(InputError):
            onnx_import.parse(data[:length])


def test_header_byte_flips_never_escape():
    data = bytearray(mutated(lambda m: None).SerializeToString())
    refused = 0
    for at in range(0, len(data), 3):
        for bit in (0, 3, 7):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            try:
                onnx_import.parse(bytes(broken))
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 100


def test_many_equal_names_stay_fast_and_become_unique():
    rng = np.random.default_rng(10)
    b = Builder((2, 3, 3))
    x = "x"
    for n in range(3000):
        x = b.node("Relu" if n else "Conv", x, *([] if n else [rng.normal(0, 1, (2, 2, 1, 1))]))
    model = b.model(b.node("Add", x, "x"), check=False)
    for node in model.graph.node:
        node.name = "same"
    graph = onnx_import.parse(model.SerializeToString())
    assert len({n.name for n in graph.nodes}) == len(graph.nodes)


def test_names_become_legal():
    rng = np.random.default_rng(11)
    b = Builder((2, 3, 3))
    model = b.model(b.conv(rng, b.conv(rng, "x", 2, 2, 1), 2, 2, 1))
    for node, name in zip(model.graph.node, ("/a/b:0", "/a/b/0")):
        node.name = name
    graph = onnx_import.parse(model.SerializeToString(), name="n")
    assert [n.name for n in graph.nodes] == ["a_b_0", "a_b_0_2"]


def mutate(data, rng):
    """A few random edits: a flipped bit, another byte, a lost byte, a repeated stretch."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data)))
        kind = rng.integers(4)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            del data[at]
        else:
            data[at:at] = data[max(0, at - int(rng.integers(1, 30))):at]
    return bytes(data)


@pytest.mark.parametrize("part", range(4))
def test_random_edits_never_escape(part):
    rng = np.random.default_rng([33, part])
    data, refused = every_layer_kind(rng).SerializeToString(), 0
    for _ in range(250):
        try:
            onnx_import.parse(mutate(data, rng))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 60


def test_signalling_nan_is_refused():
    def change(model):
        raw = bytearray(model.graph.initializer[0].raw_data)
        raw[:4] = bytes([1, 0, 0x80, 0x7F])
        model.graph.initializer[0].raw_data = bytes(raw)

    with pytest.raises(InputError, match="must be finite"):
        onnx_import.parse(mutated(change).SerializeToString())


@pytest.mark.parametrize("node, layer", [
    ("/a/a.0/Conv", "a_a_0_Conv"), ("conv1", "conv1"), ("///", ""), ("x" * 60, "x" * 48)])
def test_layer_names_of_nodes(node, layer):
    assert graphs.layer_name(node) == layer
