"""The work of a GPT-2 step, one kind a module: each with what the GPU runs and a plain torch version of the same
function, which a CPU runs."""
