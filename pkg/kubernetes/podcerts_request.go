package kubernetes

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server"
)

// signerName is what the API server accepts: a domain, and a name below it.
var signerName = regexp.MustCompile(`^([a-z0-9]([-a-z0-9]*[a-z0-9])?\.)+[a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// CheckSigner says what is wrong with the name of a signer.
func CheckSigner(name string) error {
	const advice = "write a domain of yours, a slash and a name, such as meshid.io/svid"
	domain, _, _ := strings.Cut(name, "/")
	switch {
	case len(name) > 253 || !signerName.MatchString(name):
		return fmt.Errorf("%.300q is no name of a signer; %s", name, advice)
	case domain == "kubernetes.io" || strings.HasSuffix(domain, ".kubernetes.io"):
		return fmt.Errorf("%q belongs to Kubernetes; %s", name, advice)
	default:
		return nil
	}
}

// Reasons of a denial that the API defines.
const (
	unsupportedKeyType = "UnsupportedKeyType"
	invalidAnnotations = "InvalidUnverifiedUserAnnotations"
)

// checkKey takes key and annotations from the request. What the API server has checked
// is checked again.
func (r *podRequest) checkKey(d *server.Direct) error {
	bad := func(reason, format string, args ...any) error {
		return &denial{reason: reason, message: fmt.Sprintf(format, args...), record: server.DirectRequest}
	}
	for key, value := range r.Spec.UnverifiedUserAnnotations {
		if key != SPIFFEIDAnnotation {
			return bad(invalidAnnotations, "the user annotation %.256q means nothing here: write %s, or none", key, SPIFFEIDAnnotation)
		}
		id, err := identity.ParseID(value)
		if err != nil {
			return bad(invalidAnnotations, "the user annotation %s: %v", SPIFFEIDAnnotation, err)
		}
		d.SPIFFEID, d.AnyID = id.String(), false
	}
	spec := &r.Spec
	var key any
	var err error
	switch {
	case len(spec.StubPKCS10Request) > 0 && len(spec.PKIXPublicKey) == 0 && len(spec.ProofOfPossession) == 0:
		var request *x509.CertificateRequest
		if request, err = x509.ParseCertificateRequest(spec.StubPKCS10Request); err == nil {
			key = request.PublicKey // whose proof IssueDirect verifies
		}
		d.CSR = spec.StubPKCS10Request
	case len(spec.StubPKCS10Request) == 0 && len(spec.PKIXPublicKey) > 0 && len(spec.ProofOfPossession) > 0:
		key, err = x509.ParsePKIXPublicKey(spec.PKIXPublicKey)
		d.PublicKey = spec.PKIXPublicKey
	default:
		return bad("InvalidRequest", "there is not one of a PKCS #10 request, and a public key with a proof")
	}
	if err != nil {
		return bad("InvalidRequest", "the key is malformed")
	}
	if !supported(key) {
		return bad(unsupportedKeyType, "write keyType: ECDSAP256, or one of ECDSAP384, ED25519, RSA3072, RSA4096")
	}
	if d.PublicKey != nil && !proved(key, spec.PodUID, spec.ProofOfPossession) {
		return bad("InvalidRequest", "possession of the private key is not proved")
	}
	return nil
}

// supported says whether there are certificates for keys of this kind.
func supported(key any) bool {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		return key.Curve == elliptic.P256() || key.Curve == elliptic.P384()
	case *rsa.PublicKey:
		return key.N.BitLen() >= 2048 && key.N.BitLen() <= 4096
	case ed25519.PublicKey:
		return true
	default:
		return false
	}
}

// proved verifies the signature over a pod's UID that older versions of the API have in
// place of a PKCS #10 request: it says nothing of what else is in the request.
func proved(key any, podUID string, proof []byte) bool {
	digest := sha256.Sum256([]byte(podUID))
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest[:], proof)
	case *rsa.PublicKey:
		return rsa.VerifyPSS(key, crypto.SHA256, digest[:], proof, nil) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(key, []byte(podUID), proof)
	default:
		return false
	}
}

// issued is the answer with a certificate.
func issued(svid *server.DirectSVID) (*podAnswer, error) {
	if len(svid.Chain) == 0 {
		return nil, errors.New("the CA has issued an empty chain")
	}
	leaf, err := x509.ParseCertificate(svid.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("read what was issued: %w", err)
	}
	var chain strings.Builder
	for _, der := range svid.Chain {
		chain.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	text := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	return &podAnswer{outcome: outcomeIssued, status: podCertificateStatus{
		Conditions:       []condition{final(conditionIssued, "Issued", "")},
		CertificateChain: chain.String(),
		NotBefore:        text(leaf.NotBefore),
		BeginRefreshAt:   text(refreshAt(svid.RenewAt, leaf.NotBefore, leaf.NotAfter)),
		NotAfter:         text(leaf.NotAfter),
	}}, nil
}

// refreshAt is when to renew, within the bounds of the API.
func refreshAt(renewAt, notBefore, notAfter time.Time) time.Time {
	renewAt = renewAt.Truncate(time.Second)
	if earliest := notBefore.Add(refreshMargin); renewAt.Before(earliest) {
		return earliest
	}
	if latest := notAfter.Add(-refreshMargin); renewAt.After(latest) {
		return latest
	}
	return renewAt
}

// refusedBy says what follows from a refusal of the CA.
func refusedBy(err error) error {
	refused, ok := errors.AsType[*server.DirectError](err)
	if !ok {
		return err
	}
	switch refused.Reason {
	case nodev1.Reason_REASON_UNAVAILABLE:
		return &later{refused.Message, refused.RetryAfter}
	case nodev1.Reason_REASON_QUARANTINED:
		return &denial{reason: "Quarantined", message: refused.Message}
	case nodev1.Reason_REASON_CSR:
		return &denial{reason: "InvalidRequest", message: refused.Message}
	default:
		// An entry may have been made on another CA, just before the pod.
		return &denial{reason: "Refused", message: refused.Message, hasty: true}
	}
}

// refusalOf is an answer without a certificate.
func refusalOf(kind, reason, message string) *podAnswer {
	outcome := outcomeDenied
	if kind == conditionFailed {
		outcome = outcomeFailed
	}
	return &podAnswer{outcome: outcome, status: podCertificateStatus{Conditions: []condition{final(kind, reason, cut(message))}}}
}

func final(kind, reason, message string) condition {
	return condition{Type: kind, Status: "True", Reason: reason, Message: message, LastTransitionTime: time.Now().UTC().Format(time.RFC3339)}
}
