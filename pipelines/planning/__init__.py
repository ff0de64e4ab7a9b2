"""What a run would cost on a described cluster, by formula: described cluster -> work -> estimate.

* `clusters`: the description, a data file of numbers with their sources;
* `work`: what a model computes, sends and keeps, per image, counted on a model without weights;
* `estimate`: memory and time of one mesh;
* `meshes`: every mesh of a run, best first, and why the others are refused.

Nothing is run and nothing is measured here.
"""
