"""Lower a program to something that runs: ONNX Runtime, TensorRT, torch.

in:  a `Program` (graph/)
out: an `Artifact`: a folder with the components of one target, a manifest and the hash of every file

    expand       dialect ops that a target does not fuse -> their reference bodies
    to_onnx      a stage -> one ONNX graph (`onnx_math`, `onnx_shape`, `onnx_dialect` hold the operators, `onnx_builder` the graph in
    the making)
    artifact     the folder, written atomically and verified when it is loaded
    backends/    one file per target

Add an aten operator: one decorated function in `onnx_math.py` or `onnx_shape.py`. Add a target: one file in `backends/`.
Nothing here imports passes or runtime.
"""
