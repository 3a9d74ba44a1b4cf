"""The nodes of a Ray cluster: all that is asked of Ray, which only this room imports, when it is named."""

from pma.cluster.connecting import connected
from pma.cluster.nodes import Cluster, Lost, Node, NodeProgress, OnRay, kept

__all__ = ["Cluster", "Lost", "Node", "NodeProgress", "OnRay", "connected", "kept"]
