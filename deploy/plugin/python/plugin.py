#!/usr/bin/env python3
"""An upstream CA as a plug-in, in Python: an example to begin from.

The CA that it stands for is a key in a file; put the calls of yours where sign is.
It needs grpcio and cryptography, and the stubs that grpcio-tools makes of
proto/plugin/v1/upstream.proto (see requirements.txt and docs/upstream/external.md).
"""

import argparse
import concurrent.futures
import datetime
import os
import signal
import sys
import threading

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization

from proto.plugin.v1 import upstream_pb2 as pb
from proto.plugin.v1 import upstream_pb2_grpc as pb_grpc


def der(certificate):
    return certificate.public_bytes(serialization.Encoding.DER)


class Authority(pb_grpc.UpstreamServicer):
    """The service."""

    def __init__(self, root, key):
        self.root = root
        self.key = key

    def Handshake(self, request, context):
        if 1 not in request.protocol_versions:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this plug-in speaks version 1 of the protocol")
        return pb.HandshakeResponse(protocol_version=1, name="example-python", version="1.0")

    def Mint(self, request, context):
        try:
            csr = x509.load_der_x509_csr(request.csr)
            valid = csr.is_signature_valid
        except (ValueError, InvalidSignature) as e:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the CSR is malformed: {e}")
        if not valid:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the CSR does not prove its key")
        intermediate = self.sign(csr, request.ttl.ToTimedelta())
        return pb.MintResponse(chain=[der(intermediate)], roots=[der(self.root)])

    def sign(self, csr, ttl):
        """Makes the certificate. What matters is the key, the subject and the URI of
        the request, that it is a CA, and its key usage."""
        now = datetime.datetime.now(datetime.timezone.utc)
        usage = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
             "key_agreement", "encipher_only", "decipher_only"), False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(csr.subject)
            .issuer_name(self.root.subject)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + ttl)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(csr.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.root.public_key()), critical=False)
        )
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        builder = builder.add_extension(names.value, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def WatchRoots(self, request, context):
        yield pb.WatchRootsResponse(roots=[der(self.root)])
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--certificate", required=True, help="PEM file of the root's certificate")
    parser.add_argument("--key", required=True, help="PEM file of its private key")
    args = parser.parse_args()
    socket = os.environ.get("MESHID_PLUGIN_SOCKET")
    if not socket:
        sys.exit("this is a plug-in: name it in ca.yaml, as the command of upstream.external")
    with open(args.certificate, "rb") as f:
        root = x509.load_pem_x509_certificate(f.read())
    with open(args.key, "rb") as f:
        key = serialization.load_pem_private_key(f.read(), password=None)

    # A watch keeps one worker for as long as it runs.
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=4))
    pb_grpc.add_UpstreamServicer_to_server(Authority(root, key), server)
    server.add_insecure_port("unix:" + socket)
    server.start()
    print("signing with", root.subject.rfc4514_string(), file=sys.stderr, flush=True)

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    # Standard input ends with the CA.
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), ended.set()), daemon=True).start()
    ended.wait()
    server.stop(grace=None).wait()


if __name__ == "__main__":
    main()
