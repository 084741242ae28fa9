"""Every registered layer keeps the laws that can be seen from outside."""


def test_law(layer_case, layer_law):
    layer_law(layer_case)
