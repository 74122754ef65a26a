package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/istio"
	"github.com/meshid/meshid/pkg/kubernetes"
	"github.com/meshid/meshid/pkg/server"
	istiov1 "github.com/meshid/meshid/proto/istio/v1"
)

// istioPlan are the settings, checked.
type istioPlan struct {
	istioSettings
	previous []*x509.Certificate
	tokens   map[string]istio.Tokens // of clusters by keys, and of issuers, by name
}

// planIstio checks the settings; it returns nil if there is no CA for Istio. It touches
// nothing but the files that settings name.
func planIstio(v *validated, clusters []string) (*istioPlan, error) {
	s := &v.Istio
	if s.Listen == "" || s.Listen == "off" {
		return nil, nil //nolint:nilnil // there is none
	}
	var problems []error
	bad := func(path, format string, args ...any) {
		problems = append(problems, v.file.Errorf(path, format, args...))
	}
	if _, _, err := net.SplitHostPort(s.Listen); err != nil {
		bad("istio.listen", "%q is not an address; write host:port, or :15012 for all interfaces", s.Listen)
	}
	if len(s.DNSNames) == 0 {
		bad("istio.dns_names", "missing; write the host of Istio's caAddress, such as ca.mesh-ca.svc")
	}
	for i, name := range s.DNSNames {
		if err := identity.ValidateDNSName(name); err != nil {
			bad(fmt.Sprintf("istio.dns_names[%d]", i), "%v", err)
		}
	}
	for i, account := range s.NodeProxies {
		if err := istio.CheckServiceAccount(account); err != nil {
			bad(fmt.Sprintf("istio.node_proxies[%d]", i), "%v", err)
		}
	}
	p := &istioPlan{istioSettings: *s, tokens: make(map[string]istio.Tokens)}
	if len(p.Clusters) == 0 {
		for _, name := range clusters {
			p.Clusters = append(p.Clusters, istioCluster{Name: name})
		}
	}
	if len(p.Clusters) == 1 {
		p.Clusters[0].Default = true
		if p.Clusters[0].Aliases == nil {
			p.Clusters[0].Aliases = []string{"Kubernetes"}
		}
	}
	named, fallback := make(map[string]int), -1
	for i, c := range p.Clusters {
		at := fmt.Sprintf("istio.clusters[%d]", i)
		known := slices.Contains(clusters, c.Name)
		switch {
		case c.JWKS != nil:
			keys, err := kube.NewKeys(kube.KeysConfig(*c.JWKS))
			if err != nil {
				bad(at+".jwks", "%v", err)
			} else {
				p.tokens[c.Name] = istio.TokensOf(keys)
			}
			if !exportName.MatchString(c.Name) {
				bad(at+".name", "%q is no name of a cluster; write up to 32 of a-z, 0-9, _ and -, a letter first", c.Name)
			}
		case !known:
			bad(at+".name", "%q is none of kubernetes.clusters; write one of %q, or jwks", c.Name, clusters)
		}
		if !known && (c.Roots.Keep || c.Istiod.Keep) {
			bad(at, "what is kept in a cluster needs its API server: write it into kubernetes.clusters")
		}
		for _, name := range append([]string{c.Name}, c.Aliases...) {
			if other, taken := named[name]; taken {
				bad(at, "clients that name %q cannot be of istio.clusters[%d] too", name, other)
			}
			named[name] = i
		}
		if c.Default && fallback >= 0 {
			bad(at+".default", "clients that name no cluster cannot be of istio.clusters[%d] too", fallback)
		}
		if c.Default {
			fallback = i
		}
	}
	for i, issuer := range p.Issuers {
		at := fmt.Sprintf("istio.issuers[%d]", i)
		if !exportName.MatchString(issuer.Name) || slices.Contains(clusters, issuer.Name) {
			bad(at+".name", "%q is no name of an issuer, or a cluster's; write up to 32 of a-z, 0-9, _ and -, a letter first", issuer.Name)
		}
		if err := istio.CheckIssuer(issuer.Issuer); err != nil {
			bad(at+".issuer", "%q: %v", issuer.Issuer, err)
		}
		client, err := clientTrusting(issuer.CA)
		if err != nil {
			bad(at+".ca", "%v", err)
			continue
		}
		p.tokens[issuer.Name] = istio.NewOIDC(issuer.Issuer, client)
	}
	if len(p.Clusters) == 0 && len(p.Issuers) == 0 {
		bad("istio", "there is nobody to verify tokens: write kubernetes.clusters, or istio.issuers")
	}
	if s.PreviousRoots != "" {
		var err error
		if p.previous, err = readRoots(s.PreviousRoots); err != nil {
			bad("istio.previous_roots", "%v", err)
		}
	}
	return p, errors.Join(problems...)
}

// dnsNames are the names in the CA's own X.509-SVID.
func (p *istioPlan) dnsNames() []string {
	if p == nil {
		return nil
	}
	return p.DNSNames
}

// readRoots reads the certificates of CAs.
func readRoots(path string) ([]*x509.Certificate, error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var roots []*x509.Certificate
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if !c.IsCA {
			return nil, fmt.Errorf("%s: %s is not a CA", path, c.Subject)
		}
		roots = append(roots, c)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("%s has no certificate", path)
	}
	return roots, nil
}

// istioTimeout bounds a request to an OpenID Connect provider.
const istioTimeout = 5 * time.Second

// clientTrusting is an HTTP client that trusts the CAs of a file, or the system's.
func clientTrusting(path string) (*http.Client, error) {
	transport, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return nil, errors.New("the transport is not that of net/http")
	}
	transport = transport.Clone()
	if path != "" {
		roots, err := readRoots(path)
		if err != nil {
			return nil, err
		}
		pool := x509.NewCertPool()
		for _, c := range roots {
			pool.AddCert(c)
		}
		transport.TLSClientConfig.RootCAs = pool
	}
	return &http.Client{Transport: transport, Timeout: istioTimeout}, nil
}

// istioCA is the CA for Istio's clients, with what it keeps in clusters.
type istioCA struct {
	listener net.Listener
	grpc     *grpc.Server
	roots    []*kubernetes.ConfigMaps
	istiods  []*istio.Istiod
}

// istioConditions are those of what is kept in the clusters.
func (p *istioPlan) conditions() []string {
	if p == nil {
		return nil
	}
	var names []string
	for _, c := range p.Clusters {
		names = append(names, conditionIstioRoots(c.Name), conditionIstiod(c.Name))
	}
	return names
}

func conditionIstioRoots(cluster string) string { return "istio_roots_" + cluster }
func conditionIstiod(cluster string) string     { return "istiod_" + cluster }

// open opens the listener; run has to be called.
func (p *istioPlan) open(
	ctx context.Context, v *validated, k *clusters, srv *server.Server, authority *ca.CA, reg prometheus.Registerer, t *health.Tracker, logger *slog.Logger,
) (*istioCA, error) {
	cfg := istio.Config{
		TrustDomain: v.trustDomain, Issuer: srv, Audiences: p.Audiences, NodeProxies: p.NodeProxies,
		RenewWithCertificate: p.RenewWithCertificate, PreviousRoots: p.previous, Logger: logger, Registerer: reg,
	}
	i := new(istioCA)
	for _, c := range p.Clusters {
		client := k.clients[c.Name]
		cluster := istio.Cluster{Name: c.Name, Aliases: c.Aliases, Default: c.Default, Tokens: p.tokens[c.Name]}
		if cluster.Tokens == nil {
			cluster.Tokens = istio.TokensOf(kube.NewReviewer(client))
		}
		for _, followed := range k.pods {
			if followed.name == c.Name {
				cluster.Pods = istio.PodsOf(followed.pods, followed.strict)
			}
		}
		cfg.Clusters = append(cfg.Clusters, cluster)
		allRoots := func() (roots []*x509.Certificate, sequence uint64) {
			own, sequence := authority.Bundle()
			return append(slices.Clone(own), p.previous...), sequence
		}
		if c.Roots.Keep {
			report := reportTo(t, conditionIstioRoots(c.Name))
			i.roots = append(i.roots, kubernetes.NewConfigMaps(kubernetes.ConfigMapsConfig{
				Client: client, Name: cmp.Or(c.Roots.Name, istio.DefaultRootsName), Key: istio.RootsKey, Labels: istio.Labels, Selector: c.Roots.Namespaces, Logger: logger,
				Report: func(problem string, _ int) { report(problem) },
				Bundle: func() (string, uint64) {
					roots, sequence := allRoots()
					return kubernetes.EncodeBundle(roots), sequence
				},
			}))
		}
		if c.Istiod.Keep {
			i.istiods = append(i.istiods, istio.NewIstiod(istio.IstiodConfig{
				TrustDomain: v.trustDomain, Client: client, Issuer: srv, Namespace: c.Istiod.Namespace, Secret: c.Istiod.Secret, ServiceAccount: c.Istiod.ServiceAccount,
				Roots: func() []*x509.Certificate { own, _ := authority.Bundle(); return own }, Logger: logger, Report: reportTo(t, conditionIstiod(c.Name)),
			}))
		}
	}
	for _, issuer := range p.Issuers {
		cfg.Clusters = append(cfg.Clusters, istio.Cluster{Name: issuer.Name, Issuer: issuer.Issuer, Tokens: p.tokens[issuer.Name]})
	}
	service, err := istio.New(cfg)
	if err != nil {
		return nil, err
	}
	i.grpc = srv.DirectGRPC(server.DirectListener{Connections: p.Connections, Counted: service.CountHandshake})
	istiov1.RegisterIstioCertificateServiceServer(i.grpc, service)
	if i.listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", p.Listen); err != nil {
		return nil, fmt.Errorf("istio.listen: %w", err)
	}
	return i, nil
}

// changed says that the roots may have changed. It never blocks; i may be nil.
func (i *istioCA) changed() {
	if i == nil {
		return
	}
	for _, r := range i.roots {
		r.Changed()
	}
	for _, d := range i.istiods {
		d.Changed()
	}
}

// run serves until ctx ends.
func (i *istioCA) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, r := range i.roots {
		group.Go(func() error { return r.Run(ctx) })
	}
	for _, d := range i.istiods {
		group.Go(func() error { return d.Run(ctx) })
	}
	group.Go(func() error { return cli.ServeGRPC(ctx, i.grpc, i.listener, shutdownTimeout) })
	return group.Wait()
}

// names are those of the clusters.
func (c *clusters) names() []string { return slices.Sorted(maps.Keys(c.clients)) }
