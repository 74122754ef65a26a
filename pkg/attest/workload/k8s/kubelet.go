package k8s

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// pollTimeout bounds a call to the kubelet, from connecting to the last byte.
	pollTimeout = 5 * time.Second
	// maxList bounds the kubelet's answer, in bytes: some ten thousand a pod are
	// usual. It is decoded as it comes, one pod at a time.
	maxList = 128 << 20
	// maxPods bounds the pods of a node; the kubelet's own default is 110.
	maxPods = 4096
	// maxLabels bounds the labels of a pod, keys and values together in bytes, and
	// maxLabelCount their number. A pod with more is refused, never attested with
	// fewer labels than it has.
	maxLabels     = 32 << 10
	maxLabelCount = 1024
	// maxSecret bounds the files that are read.
	maxSecret = 1 << 20
)

// errKubelet says that the kubelet did not answer, or not sensibly. It may be asked
// again.
var errKubelet = errors.New("the kubelet does not answer, try again")

// pod is what is used of a pod. It is immutable.
type pod struct {
	namespace, name, uid, serviceAccount string
	labels                               map[string]string
	owner                                owner
	phase                                string
	// containers are the images that the pod asks for, by container.
	containers map[string]string
	// ids are the containers that the kubelet has seen the runtime make.
	ids []string
	// refused says why nothing is attested of the pod, if so.
	refused string
}

// over says whether a pod has ended for good, so that what is left of it gets nothing
// any more.
func (p *pod) over() bool { return p != nil && (p.phase == "Failed" || p.phase == "Succeeded") }

// owner is the controller of a pod.
type owner struct {
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	UID        string `json:"uid"`
	Controller bool   `json:"controller"`
}

// kubelet is a client of this node's kubelet.
type kubelet struct {
	config  Config
	metrics *metrics
	timeout time.Duration
	// clusterCA and own are whose certificates are believed if no file is configured.
	clusterCA, own string

	mu     sync.Mutex // guards what follows
	cas    []byte     // that client was made with
	client *http.Client
}

func newKubelet(c Config, m *metrics) *kubelet {
	return &kubelet{config: c, metrics: m, timeout: pollTimeout, clusterCA: defaultCA, own: defaultOwn}
}

// pods lists the pods of this node. The error wraps errKubelet.
func (k *kubelet) pods(ctx context.Context) (list []*pod, err error) {
	defer func() { k.metrics.called(callPods, err) }()
	ctx, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	body, err := k.get(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errKubelet, err)
	}
	defer body.Close() //nolint:errcheck // nothing was written
	limited := &io.LimitedReader{R: body, N: maxList}
	list, err = decodePods(limited)
	switch {
	case err != nil && limited.N == 0:
		return nil, fmt.Errorf("%w: its list of pods has more than %d bytes", errKubelet, maxList)
	case err != nil:
		return nil, fmt.Errorf("%w: its list of pods: %w", errKubelet, err)
	}
	return list, nil
}

// get returns the body of an answer that says OK.
func (k *kubelet) get(ctx context.Context) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.config.Kubelet+"/pods", nil)
	if err != nil {
		return nil, err
	}
	client, err := k.connect()
	if err != nil {
		return nil, err
	}
	if req.URL.Scheme == "https" { // the read-only port is nobody to show a token to
		token, err := readFile(k.config.TokenFile)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	resp, err := client.Do(req)
	if err != nil {
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			err = fmt.Errorf("%w; it is believed if %s: where the kubelet makes its certificate itself, that file has to be there, or another one in kubelet_ca", err, k.believed())
		}
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return resp.Body, nil
	case http.StatusUnauthorized:
		err = fmt.Errorf("the kubelet at %s does not know the token in %s; its authentication needs webhook: enabled", k.config.Kubelet, k.config.TokenFile)
	case http.StatusForbidden:
		err = fmt.Errorf("the kubelet at %s refuses the agent's service account; allow it to get nodes/pods, or nodes/proxy before Kubernetes 1.33", k.config.Kubelet)
	default:
		err = fmt.Errorf("the kubelet at %s answers %s", k.config.Kubelet, resp.Status)
	}
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection can be used again
	return nil, errors.Join(err, resp.Body.Close())
}

// believed says whose certificate is.
func (k *kubelet) believed() string {
	if k.config.KubeletCA != "" {
		return "it is by " + k.config.KubeletCA
	}
	return "it is by the cluster's CA or is " + k.own
}

// trusted reads the CAs that issue the kubelet's certificate. One that the kubelet has
// made itself is believed by the file on its node, which is root's.
func (k *kubelet) trusted() ([]byte, error) {
	if k.config.KubeletCA != "" {
		return readFile(k.config.KubeletCA)
	}
	cas, err := readFile(k.clusterCA)
	own, ownErr := readFile(k.own)
	if ownErr != nil {
		return cas, err // most nodes have none
	}
	return slices.Concat(cas, []byte("\n"), own), nil
}

// connect returns a client that trusts the CAs that are in the file now.
func (k *kubelet) connect() (*http.Client, error) {
	var cas []byte
	if strings.HasPrefix(k.config.Kubelet, "https:") {
		var err error
		if cas, err = k.trusted(); err != nil {
			return nil, err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.client != nil && bytes.Equal(cas, k.cas) {
		return k.client, nil
	}
	conf := &tls.Config{
		MinVersion: tls.VersionTLS12, // the kubelet's own least
		ServerName: k.config.NodeName,
	}
	if cas != nil {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(cas) {
			return nil, fmt.Errorf("kubelet_ca: no certificate in %s", cmp.Or(k.config.KubeletCA, k.clusterCA))
		}
	}
	if k.client != nil {
		k.client.CloseIdleConnections()
	}
	k.cas = cas
	k.client = &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     conf,
			MaxIdleConnsPerHost: 1,
			IdleConnTimeout:     time.Minute,
			ForceAttemptHTTP2:   true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return k.client, nil
}

// readFile reads a small file. Its errors do not repeat what is in it.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	data, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > maxSecret:
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxSecret)
	case len(bytes.TrimSpace(data)) == 0:
		return nil, fmt.Errorf("%s is empty", path)
	}
	return data, nil
}

// decodePods reads a list of pods, one at a time.
func decodePods(r io.Reader) ([]*pod, error) {
	in := json.NewDecoder(r)
	if err := delimiter(in, '{'); err != nil {
		return nil, err
	}
	var list []*pod
	kind, found := "", false
	for in.More() {
		key, err := in.Token()
		if err != nil {
			return nil, err
		}
		switch key {
		case "kind":
			err = in.Decode(&kind)
		case "items":
			if found {
				return nil, errors.New("items twice")
			}
			found = true
			list, err = decodeItems(in)
		default:
			var skipped json.RawMessage
			err = in.Decode(&skipped)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := delimiter(in, '}'); err != nil {
		return nil, err
	}
	if kind != "PodList" || !found {
		return nil, fmt.Errorf("is of kind %.100q, want PodList with items", kind)
	}
	return list, nil
}

// decodeItems reads the pods of a list. A node without any has null.
func decodeItems(in *json.Decoder) ([]*pod, error) {
	first, err := in.Token()
	if err != nil || first == nil {
		return nil, err
	}
	if first != json.Delim('[') {
		return nil, fmt.Errorf("items begin with %v", first)
	}
	var list []*pod
	seen := make(map[string]bool)
	for in.More() {
		var i item
		if err := in.Decode(&i); err != nil {
			return nil, err
		}
		p := i.pod()
		switch {
		case p == nil:
			continue
		case seen[p.uid]:
			return nil, fmt.Errorf("pod %s twice", p.uid)
		case len(list) == maxPods:
			return nil, fmt.Errorf("more than %d pods", maxPods)
		}
		seen[p.uid] = true
		list = append(list, p)
	}
	return list, delimiter(in, ']')
}

func delimiter(in *json.Decoder, want json.Delim) error {
	got, err := in.Token()
	if err == nil && got != want {
		err = fmt.Errorf("got %v, want %v", got, want)
	}
	return err
}

// item is what is decoded of a pod. It has no place for environment variables,
// arguments or volumes.
type item struct {
	Metadata struct {
		Namespace   string            `json:"namespace"`
		Name        string            `json:"name"`
		UID         string            `json:"uid"`
		Labels      map[string]string `json:"labels"`
		Annotations struct {
			Mirror string `json:"kubernetes.io/config.mirror"`
		} `json:"annotations"`
		Owners []owner `json:"ownerReferences"`
	} `json:"metadata"`
	Spec struct {
		ServiceAccount      string          `json:"serviceAccountName"`
		Containers          []specContainer `json:"containers"`
		InitContainers      []specContainer `json:"initContainers"`
		EphemeralContainers []specContainer `json:"ephemeralContainers"`
	} `json:"spec"`
	Status struct {
		Phase      string            `json:"phase"`
		Containers []statusContainer `json:"containerStatuses"`
		Init       []statusContainer `json:"initContainerStatuses"`
		Ephemeral  []statusContainer `json:"ephemeralContainerStatuses"`
	} `json:"status"`
}

type specContainer struct {
	Name  string `json:"name"`
	Image string `json:"image"`
}

type statusContainer struct {
	ID string `json:"containerID"` // "containerd://<id>"
}

// pod returns what is used of the item, nil for what runs no container: the API
// server's mirror of a pod from the kubelet's files has a UID of its own, and anybody
// may make a pod that says that it is one. The kubelet lists the real one, under the
// UID that its cgroups and the runtime know.
func (i *item) pod() *pod {
	m := &i.Metadata
	if m.UID == "" || m.Namespace == "" || m.Name == "" || m.Annotations.Mirror != "" && m.Annotations.Mirror != m.UID {
		return nil
	}
	p := &pod{
		namespace: m.Namespace, name: m.Name, uid: m.UID, labels: m.Labels, phase: i.Status.Phase,
		serviceAccount: i.Spec.ServiceAccount, containers: make(map[string]string),
	}
	for _, o := range m.Owners {
		if o.Controller {
			p.owner = o
		}
	}
	for _, all := range [][]specContainer{i.Spec.Containers, i.Spec.InitContainers, i.Spec.EphemeralContainers} {
		for _, c := range all {
			p.containers[c.Name] = c.Image
		}
	}
	for _, all := range [][]statusContainer{i.Status.Containers, i.Status.Init, i.Status.Ephemeral} {
		for _, c := range all {
			if _, id, ok := strings.Cut(c.ID, "://"); ok {
				p.ids = append(p.ids, id)
			}
		}
	}
	size := 0
	for k, v := range p.labels {
		size += len(k) + len(v)
	}
	switch {
	case len(p.labels) > maxLabelCount:
		p.refused = fmt.Sprintf("has %d labels, at most %d are attested: remove some", len(p.labels), maxLabelCount)
	case size > maxLabels:
		p.refused = fmt.Sprintf("has labels of %d bytes, at most %d are attested: make them shorter", size, maxLabels)
	}
	return p
}
