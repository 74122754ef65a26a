// Package podcert shows real kubelets that take certificates from the CA: it answers
// their PodCertificateRequests, and they write keys and certificates into pods.
package podcert

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

func TestMain(m *testing.M) {
	os.Exit(kube.Main(m)) //nolint:forbidigo // as every TestMain
}

const entries = `
- name: cart
  spiffe_id: spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}
  nodes: node.k8s.cluster == "prod"
  workloads: k8s.namespace == "shop" && k8s.labels["app"] == "cart"
`

const accounts = `
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: cart, namespace: shop}
`

const pod = `
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: shop, labels: {app: %[2]s}}
spec:
  serviceAccountName: cart
  terminationGracePeriodSeconds: 1
  containers:
  - {name: app, image: %[1]s, command: [/bin/sh, -c, busybox sleep 100000], volumeMounts: [{name: svid, mountPath: /run/svid}]}
  volumes:
  - name: svid
    projected:
      sources:
      - podCertificate: {signerName: meshid.io/svid, keyType: ECDSAP256, credentialBundlePath: svid.pem, maxExpirationSeconds: 3600}
      - clusterTrustBundle: {name: "meshid.io:svid:bundle", path: bundle.pem}
`

// credential is what is in the file of a pod.
type credential struct {
	key   crypto.Signer
	chain []*x509.Certificate
}

func parse(text string) (*credential, error) {
	c := &credential{}
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		switch block.Type {
		case "CERTIFICATE":
			certificate, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, err
			}
			c.chain = append(c.chain, certificate)
		default:
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			signer, ok := key.(crypto.Signer)
			if !ok {
				return nil, fmt.Errorf("a key of type %T", key)
			}
			c.key = signer
		}
	}
	if c.key == nil || len(c.chain) == 0 {
		return nil, errors.New("there is not a key and a certificate")
	}
	return c, nil
}

// check checks that the certificate is the pod's, for the key beside it.
func (c *credential) check(t *testing.T, bundle string) {
	t.Helper()
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(bundle))
	for _, certificate := range c.chain[1:] {
		between.AddCert(certificate)
	}
	leaf := c.chain[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	if public, ok := leaf.PublicKey.(interface {
		Equal(key crypto.PublicKey) bool
	}); !ok || !public.Equal(c.key.Public()) {
		t.Error("the certificate is for another key")
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/ns/shop/sa/cart" {
		t.Errorf("the certificate is for %v", leaf.URIs)
	}
}

// A real pod gets key and certificate as a file, and new ones when its kubelet asks again;
// one that has no identity stays away, and its events say why.
func TestClusterPodCertificate(t *testing.T) {
	c := kube.StartCluster(t, kube.Options{Nodes: 1})
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf("kubernetes:\n  clusters:\n    - {name: prod, kubeconfig: %s, pod_certificates: {signer: meshid.io/svid}, bundle: {cluster_trust_bundle: 'meshid.io:svid:bundle'}}\n", c.Kubeconfig)})
	ca.Apply(t, entries)
	c.Apply(t, accounts)
	for _, name := range []string{"cart", "stranger"} {
		c.Apply(t, fmt.Sprintf(pod, kube.BusyBox, name))
	}
	file := func(name string) (string, error) {
		return c.Kubectl(t, "exec", "-n", "shop", "cart", "--", "busybox", "cat", "/run/svid/"+name)
	}
	read := func() (*credential, error) {
		out, err := file("svid.pem")
		if err != nil {
			return nil, err
		}
		return parse(out)
	}
	c.AwaitPods(t, "shop", "app=cart", 1)
	first, err := read()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := file("bundle.pem")
	if err != nil {
		t.Fatal(err)
	}
	first.check(t, bundle)

	local.Await(t, "an event of the pod without an identity", func(context.Context) error {
		out, err := c.Kubectl(t, "get", "events", "-n", "shop", "--field-selector=involvedObject.name=stranger", "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(out, "Refused") {
			err = errors.New(out)
		}
		return err
	})

	// The API allows a renewal after ten minutes at the earliest. But a kubelet keeps no
	// key: when it starts again, it asks again.
	node := c.Nodes[0]
	node.Kubelet.Kill()
	node.StartKubelet(t)
	local.Await(t, "the next certificate in the file", func(context.Context) error {
		next, err := read()
		if err != nil {
			return err
		}
		if next.chain[0].SerialNumber.Cmp(first.chain[0].SerialNumber) == 0 {
			return errors.New("it is the first one still")
		}
		next.check(t, bundle)
		return nil
	})
}
