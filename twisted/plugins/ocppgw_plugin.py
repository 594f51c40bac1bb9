"""What twistd, strcred and endpoint strings find by name: no logic, and no import of ours until it is asked for."""

from twisted.application.service import ServiceMaker
from twisted.cred.credentials import IUsernamePassword
from twisted.cred.strcred import ICheckerFactory
from twisted.plugin import IPlugin
from zope.interface import implementer

ocppgw = ServiceMaker("ocppgw", "ocppgw.tap", "A gateway between OCPP-J charge points and MQTT.", "ocppgw")


@implementer(ICheckerFactory, IPlugin)
class PasswordFileFactory:
    """What ``--auth htpasswd:FILE`` finds."""

    authType = "htpasswd"
    authHelp = """
    A file with one line for each charge point, IDENTITY:HASH, as 'ocppgw passwd FILE IDENTITY' writes it. The hash
    is a salted argon2id. The file is read again when it has changed.
    """
    argStringFormat = "A path to a file."
    credentialInterfaces = (IUsernamePassword,)

    def generateChecker(self, argstring):
        """Make the checker. Raises ocppgw.auth.PasswordFileError."""
        from pathlib import Path

        from ocppgw.auth import PasswordFile

        return PasswordFile(Path(argstring))


htpasswd = PasswordFileFactory()
