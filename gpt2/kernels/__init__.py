"""The work of a GPT-2 step, one kind of work a module: each with what the GPU runs and a plain torch version of the same
function, which is what a CPU runs and what the tests hold the GPU's version against."""
