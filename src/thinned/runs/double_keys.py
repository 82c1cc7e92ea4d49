"""A key that a yaml holds twice is an error: PyYAML would take the last one in silence."""

import yaml


def refuse_double_keys(text: str, where: str = "the yaml") -> None:
    r"""Raises a ValueError if a mapping has a key twice.

    >>> refuse_double_keys("a: 1\nb:\n  c: 2\n  c: 3")
    Traceback (most recent call last):
    ValueError: Expected each key once in the yaml, but got c in line 3 and in line 4
    """
    try:
        nodes = [yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
    except yaml.YAMLError:  # reported by whoever parses it
        return
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                nodes.append(value)
                line = key.start_mark.line + 1
                name = key.tag, str(key.value)
                if name in lines:
                    got = f"{key.value} in line {lines[name]} and in line {line}"
                    raise ValueError(f"Expected each key once in {where}, but got {got}")
                lines[name] = line
