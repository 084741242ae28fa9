import pytest

# Failed assertions of the helpers say what they compared, as those of tests do.
pytest.register_assert_rewrite("tests.program.programs")
