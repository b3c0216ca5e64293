"""What a person sees of train.py and evaluate.py: first lines, accuracy, predictions."""
import csv

import numpy as np

from scripts.mirror_labels import mirror_labels


def print_run(args, train_set, val_set, model, world, micro):
    """The first lines of a training: data, labels that flips change, model, batches.

    world: number of processes, micro: clips of a forward pass
    """
    names = train_set.classes
    print(f"{args.dataset}: {len(train_set)} training and {len(val_set)} validation clips, "
          f"{len(names)} classes; skipped: {train_set.skipped} and {val_set.skipped}")
    if args.flip:
        mirrored, alone = mirror_labels(names)
        pairs = [f"{names[i]!r} and {names[j]!r}" for i, j in enumerate(mirrored) if i < j]
        none = "none; --no-flip if a class is the mirror image of another"
        print("  flips swap these labels:", "; ".join(pairs) or none)
        if alone:
            print("  flips keep these labels, which name a side; --no-flip if that is wrong:",
                  ", ".join(map(repr, alone)))
    config, device = model.config, next(model.parameters()).device.type
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{config.depth} layers of width {config.dim}, {parameters:.2f} M parameters, "
          f"{args.precision} on {device}; {args.batch_size} clips per step = {world} processes "
          f"x {args.batch_size // (world * micro)} x {micro}, at lr {args.lr}")
    if args.batch_size == world and (args.mixup or args.cutmix):
        print("  MixUp and CutMix do nothing: they mix the clips of a process, and each has one")


def print_result(result, dataset, views):
    """The accuracy of an evaluation, as the last line. views: "frames x crops x clips" """
    if dataset.skipped:
        print(f"{dataset.skipped} clips on the skip list count as wrong")
    if dataset.labels.min() < 0:
        print("This split has no labels, so no accuracy. --save keeps the predictions.")
    else:
        print(f"top1 {result['top1']:.2f} top5 {result['top5']:.2f} clips {result['clips']} "
              f"views {views}")


def top_classes(probabilities, classes, k=5):
    """[(name, probability)] of the k most likely classes. probabilities: (classes,)"""
    top = probabilities.topk(min(k, len(classes)))
    return [(classes[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist())]


def print_top5(path, probabilities, classes):
    print(path)
    for name, p in top_classes(probabilities, classes):
        print(f"  {100 * p:6.2f} %  {name}")


def save_predictions(path, ids, labels, probabilities, classes):
    """FILE.csv: id, true class (empty if unknown) and the top 5. FILE.npz: all probabilities."""
    if path.endswith(".npz"):
        np.savez(path, ids=ids, labels=labels, probabilities=probabilities, classes=classes)
        return
    with open(path, "w", newline="", encoding="utf-8") as f:
        f.write("id,label,top1,p1,top2,p2,top3,p3,top4,p4,top5,p5\r\n")
        for clip, label, p in zip(ids, labels, probabilities):
            pairs = [x for name, q in top_classes(p, classes) for x in (name, f"{q:.5f}")]
            csv.writer(f).writerow([clip, classes[label] if label >= 0 else "", *pairs])
