"""`SchemaDocument`: where a JSON Schema's references point, inside that one document.

Knows `$id`/`id`, anchors, JSON pointers and drafts; fetches nothing. A reference that leaves the document is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from textgen_engine.errors import GrammarError
from textgen_engine.grammar.json_schema import children

_OLD_DRAFT = re.compile(r"draft-0[3-7]")


@dataclass(frozen=True, eq=False)
class Place:
    """One subschema of a document: the node itself, the base URI its references resolve against, and its pointer."""

    node: Any
    base: str
    pointer: str


class SchemaDocument:
    """A schema with an index of its resources. The document must not change afterwards."""

    def __init__(self, root: Any) -> None:
        self.root = Place(root, self._base_of(root, ""), "#")
        # Up to draft 7 everything beside $ref is ignored, `items` may be a list, and $id may be an anchor.
        dialect = root.get("$schema", "") if isinstance(root, dict) else ""
        self.is_old_draft = bool(_OLD_DRAFT.search(dialect))
        self._resources: dict[str, Place] = {"": self.root, self.root.base: self.root}
        self._places: dict[int, Place] = {}
        self._dynamic_anchors: dict[str, list[Place]] = {}
        self._index(self.root)

    def child(self, parent: Place, path: tuple[str, ...], node: Any) -> Place:
        """The place of a subschema found under `parent`."""
        known = self._places.get(id(node)) if isinstance(node, dict) else None
        if known is not None:
            return known
        steps = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in path)
        return Place(node, self._base_of(node, parent.base), parent.pointer + steps)

    def resolve(self, place: Place, reference: str) -> Place:
        """The subschema `reference` names. Raises GrammarError, naming it, when the document does not contain it."""
        target = urljoin(place.base, reference) if place.base or not reference.startswith("#") else reference
        base, fragment = urldefrag(target)
        whole = self._resources.get(base + "#" + fragment) if fragment else None
        if whole is not None:
            return whole
        resource = self._resources.get(base)
        if resource is None:
            raise GrammarError(
                f"JSON schema: '$ref' to {reference!r:.200} at {place.pointer[:200]} is not in this document"
            )
        found = resource
        if fragment.startswith("/"):
            found = self._follow(resource, unquote(fragment), reference)
        elif fragment:
            raise GrammarError(f"JSON schema: '$ref' to {reference!r:.200} at {place.pointer[:200]}: no such anchor")
        return found

    def resolve_dynamic(self, place: Place, reference: str) -> Place:
        """A `$dynamicRef`, where it means the same as `$ref`: its anchor exists once. Raises GrammarError."""
        name = reference.rsplit("#", 1)[-1]
        if len(self._dynamic_anchors.get(name, [])) > 1:
            raise GrammarError(
                f"JSON schema: '$dynamicRef' with several anchors is not supported at {place.pointer[:200]}"
            )
        return self.resolve(place, reference)

    def _index(self, root: Place) -> None:
        pending = [root]
        while pending:
            place = pending.pop()
            node = place.node
            if not isinstance(node, dict):
                continue
            self._places[id(node)] = place
            if isinstance(self._id_of(node), str):
                self._resources.setdefault(place.base, place)
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(node.get(key), str):
                    self._resources[f"{place.base}#{node[key]}"] = place
            if isinstance(node.get("$dynamicAnchor"), str):
                self._dynamic_anchors.setdefault(node["$dynamicAnchor"], []).append(place)
            identifier = self._id_of(node)
            if isinstance(identifier, str) and identifier.startswith("#") and len(identifier) > 1:
                self._resources[f"{place.base}{identifier}"] = place  # an anchor, up to draft 7
            for path, inner in children(node):
                steps = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in path)
                pending.append(Place(inner, self._base_of(inner, place.base), place.pointer + steps))

    def _follow(self, resource: Place, fragment: str, reference: str) -> Place:
        node, base, path = resource.node, resource.base, resource.pointer
        for raw in fragment.split("/")[1:]:
            step = raw.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and step.isdigit() and int(step) < len(node):
                node = node[int(step)]
            elif isinstance(node, dict) and step in node:
                node = node[step]
            else:
                raise GrammarError(f"JSON schema: '$ref' to {reference!r:.200}: nothing is there")
            path += "/" + raw
            base = self._base_of(node, base)
        if not isinstance(node, dict | bool):
            raise GrammarError(f"JSON schema: '$ref' to {reference!r:.200}: no schema is there")
        return self._places.get(id(node)) or Place(node, base, path)

    def _base_of(self, node: Any, outer: str) -> str:
        identifier = self._id_of(node)
        if not isinstance(identifier, str) or identifier.startswith("#"):
            return outer
        return urldefrag(urljoin(outer, identifier))[0]

    @staticmethod
    def _id_of(node: Any) -> Any:
        return node.get("$id", node.get("id")) if isinstance(node, dict) else None
