"""Tasks that come with curvepress, one file each; every one is an example of how to write your own."""

__all__ = ["cifar10", "cifar10_vit", "digits", "imagenette", "sst2"]
