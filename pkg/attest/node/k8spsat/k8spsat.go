// Package k8spsat answers "which machine is this?" by a Kubernetes service account
// token that is bound to the agent's pod: the cluster signs which pod the agent is,
// and on which node that pod runs.
//
// The agent sends the token that the kubelet keeps in a projected volume. What the CA
// believes of it is what the cluster itself says or signed: the CA's half knows no
// cluster, it is given what verifies each one's tokens. Names can be used again, so
// that the node is named by its UID.
//
// What is sent (the wire format, version 1): one byte 0x01, one byte with the length of
// the cluster's name, that name, and the token. The name says only by whom the token is
// to be verified: a token of another cluster is none of this one's. It is a secret on
// its way to the CA, so the agent sends it only over TLS that has authenticated the CA.
// There is no challenge, and the token cannot be bound to a key; so it is good for one
// attestation.
package k8spsat

import (
	"errors"
	"fmt"
)

// Method is the method's name.
const Method = "k8s_psat"

// DefaultAudience is whom the token is for, unless the CA is configured otherwise.
const DefaultAudience = "meshid"

const (
	version = 1
	// maxCluster bounds the name of a cluster, and maxToken a token, in bytes.
	maxCluster = 63
	maxToken   = 16 << 10
)

// CheckCluster says what is wrong with the name of a cluster, if anything is. It is part
// of the ids of nodes, before a dot.
func CheckCluster(name string) error {
	if name == "" || len(name) > maxCluster {
		return fmt.Errorf("%.100q is no name of a cluster; write 1 to %d characters", name, maxCluster)
	}
	for i := range len(name) {
		if c := name[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return fmt.Errorf("%q is no name of a cluster; only a-z, 0-9, '-' and '_' are allowed", name)
		}
	}
	return nil
}

// encode makes the evidence.
func encode(cluster, token string) []byte {
	b := append([]byte{version, byte(len(cluster))}, cluster...) //nolint:gosec // checked to be short
	return append(b, token...)
}

// decode is the inverse of encode, for the bytes of strangers.
func decode(evidence []byte) (cluster, token string, err error) {
	switch {
	case len(evidence) < 2:
		return "", "", errors.New("evidence is cut off")
	case evidence[0] != version:
		return "", "", fmt.Errorf("evidence has version %d, want %d", evidence[0], version)
	}
	n := int(evidence[1])
	rest := evidence[2:]
	switch {
	case n > maxCluster || n >= len(rest):
		return "", "", errors.New("evidence is cut off")
	case len(rest)-n > maxToken:
		return "", "", fmt.Errorf("token has more than %d bytes", maxToken)
	}
	cluster, token = string(rest[:n]), string(rest[n:])
	return cluster, token, CheckCluster(cluster)
}
