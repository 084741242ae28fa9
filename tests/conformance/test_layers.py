"""Every registered layer keeps the laws that can be seen from outside: its documents, its state, its precision."""


def test_law(layer_case, layer_law):
    layer_law(layer_case)
