"""What the client can do, read once from its capabilities."""

from __future__ import annotations

from dataclasses import dataclass

from lsprotocol import types
from pygls.capabilities import get_capability


@dataclass(frozen=True)
class ClientFeatures:
    """The client capabilities that change what we send; the defaults are those of the barest client."""

    apply_edit: bool = False
    document_changes: bool = False
    create_files: bool = False
    delete_files: bool = False
    code_action_literals: bool = False
    disabled_actions: bool = False
    action_data: bool = False
    diagnostic_data: bool = False
    related_information: bool = False
    diagnostic_version: bool = False
    progress: bool = False
    show_document: bool = False

    @staticmethod
    def of(capabilities: types.ClientCapabilities) -> ClientFeatures:
        """Read a client's capabilities."""

        def has(name: str) -> bool:
            return bool(get_capability(capabilities, name, False))

        resources = get_capability(capabilities, "workspace.workspace_edit.resource_operations", None) or ()
        return ClientFeatures(
            apply_edit=has("workspace.apply_edit"),
            document_changes=has("workspace.workspace_edit.document_changes"),
            create_files=types.ResourceOperationKind.Create in resources,
            delete_files=types.ResourceOperationKind.Delete in resources,
            code_action_literals=has("text_document.code_action.code_action_literal_support"),
            disabled_actions=has("text_document.code_action.disabled_support"),
            action_data=has("text_document.code_action.data_support"),
            diagnostic_data=has("text_document.publish_diagnostics.data_support"),
            related_information=has("text_document.publish_diagnostics.related_information"),
            diagnostic_version=has("text_document.publish_diagnostics.version_support"),
            progress=has("window.work_done_progress"),
            show_document=has("window.show_document.support"),
        )
