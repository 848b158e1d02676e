"""Read a finished run (`make demo` first): its nodes, its table, and the pairs that DPO learnt from."""

import sys

import cotree

run = cotree.open_run(sys.argv[1] if len(sys.argv) > 1 else "runs/laptop")
for name, node in run.nodes.items():
    print(f"{name:22} {node.seconds:7.1f} s  {'done' if node.done else 'not finished'}")
for row in run.table():
    print(f"{row['evaluation']:6} {row['model']:10} {row['task']:11} {100 * row['accuracy']:5.1f}%")
pair = next(run.dataset("pairs"))
print("\nchosen:\n" + pair["chosen"][0]["content"], "\n\nrejected:\n" + pair["rejected"][0]["content"])
