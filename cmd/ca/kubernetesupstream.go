package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca/upstream/certmanager"
	"github.com/meshid/meshid/pkg/ca/upstream/k8scsr"
)

// upstreamCluster looks at the cluster that an upstream CA is asked through.
type upstreamCluster struct {
	client *kube.Client
	name   string // of the section
	kind   string // of the requests
	at     kube.Path
	rights []need
	fix    string // where the kind is not there
}

// openUpstreamCluster returns nil if no upstream CA is asked through Kubernetes.
func openUpstreamCluster(v *validated, logger *slog.Logger) (t *upstreamCluster, err error) {
	if _, err := openUpstreamCA(v, logger); err != nil {
		return nil, err // what is wrong with the settings
	}
	u := v.Upstream
	requests := func(group, plural, namespace string) kube.Path {
		return kube.Path{Resource: kube.Resource{Group: group, Version: "v1", Plural: plural}, Namespace: namespace}
	}
	var kubeconfig, context string
	switch {
	case u.K8sCSR.Present():
		var c k8scsr.Config
		err = u.K8sCSR.Decode(&c)
		kubeconfig, context = c.Kubeconfig, c.Context
		t = &upstreamCluster{
			name: "k8scsr", kind: "CertificateSigningRequest", at: requests(certificatesGroup, "certificatesigningrequests", ""), rights: csrRights(&c),
			fix: "every Kubernetes has it: see that the address is that of an API server",
		}
	case u.CertManager.Present():
		var c certmanager.Config
		err = u.CertManager.Decode(&c)
		kubeconfig, context = c.Kubeconfig, c.Context
		t = &upstreamCluster{
			name: "certmanager", kind: "CertificateRequest", at: requests(certManagerGroup, "certificaterequests", c.Namespace), rights: certManagerRights(&c),
			fix: "install cert-manager in this cluster, or see that upstream.certmanager.kubeconfig is that of the cluster that has it",
		}
	default:
		return nil, nil //nolint:nilnil // there is nothing to look at, and nothing wrong
	}
	if err != nil {
		return nil, err
	}
	if t.client, err = openCluster(clusterSettings{Name: t.name, Kubeconfig: kubeconfig, Context: context}, nil, logger); err != nil {
		return nil, fmt.Errorf("upstream.%s: %w", t.name, err)
	}
	return t, nil
}

func (t *upstreamCluster) check(r *clusterReport) {
	run := func(name string, what func(context.Context) (string, error), fix func(error) string) bool {
		return r.run("upstream "+t.name+": "+name, what, fix)
	}
	if !run("the API server answers", func(ctx context.Context) (version string, err error) {
		version, _, err = t.client.Server(ctx)
		return version, err
	}, func(error) string { return answersFix }) {
		return
	}
	run("the kind "+t.kind+" is there", func(ctx context.Context) (string, error) {
		return "v1", t.client.List(ctx, t.at, kube.Selection{Limit: 1}, new(kube.Page[kube.Object]))
	}, func(err error) string {
		if errors.Is(err, kube.ErrNotFound) {
			return t.fix
		}
		return errorSaysFix
	})
	for _, n := range t.rights {
		run("the CA may "+n.String(), func(ctx context.Context) (string, error) { return may(ctx, t.client, n) }, nil)
	}
}
