package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshid/meshid/test/local"
)

const shop = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: cart}}
  template:
    metadata: {labels: {app: cart}}
    spec:
      serviceAccountName: cart
      terminationGracePeriodSeconds: 1
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: cart}}}
      containers:
      - name: app
        image: ` + BusyBox + `
        command: [/bin/sh, -c, "trap 'exit 0' TERM; busybox httpd -p 8080 -h /run/token; while :; do busybox sleep 1 & wait; done"]
        readinessProbe: {httpGet: {port: 8080, path: /token}, periodSeconds: 1}
        volumeMounts: [{name: token, mountPath: /run/token}]
      volumes:
      - name: token
        projected: {sources: [{serviceAccountToken: {path: token, audience: mesh-ca, expirationSeconds: 600}}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.7.7, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}
`

const sidecar = `
apiVersion: v1
kind: Pod
metadata: {name: meshed, namespace: shop, labels: {app: meshed}}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
  - name: envoy
    image: %s
    restartPolicy: Always
    args: [--config-yaml, "admin: {address: {socket_address: {address: 0.0.0.0, port_value: 9901}}}"]
    startupProbe: {httpGet: {port: 9901, path: /ready}, periodSeconds: 1, failureThreshold: 60}
    securityContext: {runAsUser: 1337, runAsNonRoot: true, allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: app
    image: %s
    command: [/bin/sh, -c, busybox sleep 1000]
`

// Pods run, are who their tokens say, come and go, and go on when their node is cut
// off; and nothing is left of it all.
func TestCluster(t *testing.T) {
	var dir, link string
	t.Run("life", func(t *testing.T) {
		c := StartCluster(t, Options{Nodes: 2, KubeProxy: true})
		dir, link = c.dir, c.link()
		c.Account(t, "shop", "cart")
		c.Apply(t, shop)
		pods := c.AwaitPods(t, "shop", "app=cart", 3)

		t.Run("pods are on both nodes", func(t *testing.T) {
			for _, n := range c.Nodes {
				if !slices.ContainsFunc(pods, func(p RunningPod) bool { return p.Spec.NodeName == n.Name }) {
					t.Errorf("none on %s", n.Name)
				}
			}
		})
		t.Run("a token says which pod and node", func(t *testing.T) {
			for _, p := range pods {
				token := c.MustKubectl(t, "exec", "-n", "shop", p.Metadata.Name, "--", "busybox", "cat", "/run/token/token")
				r := c.Review(t, token, "mesh-ca")
				if !r.Authenticated {
					t.Fatalf("not authenticated: %s", r.Error)
				}
				for key, want := range map[string]string{"pod-name": p.Metadata.Name, "pod-uid": p.Metadata.UID, "node-name": p.Spec.NodeName} {
					if got := r.User.Extra["authentication.kubernetes.io/"+key]; !slices.Equal(got, []string{want}) {
						t.Errorf("%s: %q, want %q", key, got, want)
					}
				}
			}
		})
		t.Run("pods reach one another, the API server and this machine", func(t *testing.T) {
			l, err := net.Listen("tcp", net.JoinHostPort(c.HostIP, "0"))
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "host") })}
			go func() { _ = server.Serve(l) }()
			t.Cleanup(func() { _ = server.Close() })
			want := map[string]string{ // what the answer begins with
				"http://10.96.7.7/token":          "ey",
				"http://" + l.Addr().String():     "host",
				"https://" + serviceIP + "/livez": "ok",
			}
			for _, p := range pods {
				want["http://"+p.Status.PodIP+":8080/token"] = "ey"
			}
			roots := x509.NewCertPool()
			roots.AddCert(c.authority.certificate)
			for _, from := range pods {
				client := &http.Client{Transport: &http.Transport{
					DialContext:       func(ctx context.Context, _, address string) (net.Conn, error) { return c.Dial(ctx, t, from, address) },
					TLSClientConfig:   &tls.Config{RootCAs: roots},
					DisableKeepAlives: true,
				}}
				for url, want := range want {
					local.Await(t, from.Metadata.Name+" fetches "+url, func(ctx context.Context) error {
						req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
						if err != nil {
							return err
						}
						resp, err := client.Do(req)
						if err != nil {
							return err
						}
						defer resp.Body.Close()
						body, err := io.ReadAll(resp.Body)
						if err == nil && !strings.HasPrefix(string(body), want) {
							err = fmt.Errorf("got %q", body)
						}
						return err
					})
				}
			}
		})
		t.Run("up and down", func(t *testing.T) {
			c.MustKubectl(t, "scale", "-n", "shop", "deployment/cart", "--replicas=8")
			c.AwaitPods(t, "shop", "app=cart", 8)
			c.MustKubectl(t, "scale", "-n", "shop", "deployment/cart", "--replicas=2")
			pods = c.AwaitPods(t, "shop", "app=cart", 2)
		})
		t.Run("a container that is killed starts again", func(t *testing.T) {
			name, before := pods[0].Metadata.Name, c.PIDs(t, pods[0], "app")
			c.KillContainer(t, pods[0], "app")
			local.Await(t, "wait for the restart", func(context.Context) error {
				pods = c.AwaitPods(t, "shop", "app=cart", 2)
				i := slices.IndexFunc(pods, func(p RunningPod) bool { return p.Metadata.Name == name })
				if i < 0 {
					t.Fatal("the pod is gone")
				}
				if n := pods[i].Status.Containers[0].RestartCount; n != 1 {
					return fmt.Errorf("%d restarts", n)
				}
				for _, pid := range c.PIDs(t, pods[i], "app") {
					if slices.Contains(before, pid) {
						t.Errorf("process %d is still there", pid)
					}
				}
				return nil
			})
		})
		t.Run("a node that is cut off goes on", func(t *testing.T) {
			n := c.Node(t, pods[0])
			before := c.PIDs(t, pods[0], "app")
			n.Disconnect(t)
			n.AwaitReady(t, false)
			if after := c.PIDs(t, pods[0], "app"); !slices.Contains(after, before[0]) {
				t.Errorf("processes %v, want %d among them", after, before[0])
			}
			n.Connect(t)
			n.AwaitReady(t, true)
		})
		t.Run("a node that is cordoned gets no pod", func(t *testing.T) {
			c.MustKubectl(t, "cordon", "node-2")
			c.MustKubectl(t, "create", "deployment", "-n", "shop", "other", "--image="+BusyBox, "--replicas=3", "--", "/bin/sh", "-c", "busybox sleep 1000")
			for _, p := range c.AwaitPods(t, "shop", "app=other", 3) {
				if p.Spec.NodeName != "node-1" {
					t.Errorf("pod %s is on %s", p.Metadata.Name, p.Spec.NodeName)
				}
			}
			c.MustKubectl(t, "uncordon", "node-2")
		})
		t.Run("Envoy runs as a sidecar", func(t *testing.T) {
			c.Apply(t, fmt.Sprintf(sidecar, c.ImportEnvoy(t), BusyBox))
			c.AwaitPods(t, "shop", "app=meshed", 1)
		})
		t.Run("a node is switched off and on", func(t *testing.T) {
			n := c.Nodes[1]
			n.PowerOff(t)
			n.AwaitReady(t, false)
			n.Boot(t)
			n.AwaitReady(t, true)
			c.AwaitPods(t, "shop", "app=cart", 2)
		})
		t.Run("kubelet and containerd start again", func(t *testing.T) {
			n := c.Nodes[0]
			n.Kubelet.Kill()
			n.Containerd.Kill()
			n.StartContainerd(t)
			n.StartKubelet(t)
			c.MustKubectl(t, "scale", "-n", "shop", "deployment/cart", "--replicas=4")
			c.AwaitPods(t, "shop", "app=cart", 4)
		})
		t.Run("a node's paths are its own", func(t *testing.T) {
			for _, n := range c.Nodes {
				if _, err := n.Exec(t, "sh", "-c", "! test -e /run/here && hostname >/run/here && test \"$(cat /run/here)\" = "+n.Name); err != nil {
					t.Error(err)
				}
			}
		})
	})
	if dir == "" {
		t.SkipNow() // for the reason that it gave
	}
	t.Run("nothing is left", func(t *testing.T) {
		for _, err := range leftovers(t, dir, link) {
			t.Error(err)
		}
	})
}

// leftovers says what there still is of a cluster.
func leftovers(t *testing.T, dir, link string) []error {
	t.Helper()
	var found []error
	if _, err := os.Stat(dir); err == nil {
		found = append(found, fmt.Errorf("folder %s", dir))
	}
	if _, err := net.InterfaceByName(link); err == nil {
		found = append(found, fmt.Errorf("interface %s", link))
	}
	for _, g := range cgroups(t, link+"-*") {
		found = append(found, fmt.Errorf("cgroup %s", g))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) || strings.Contains(line, "cni-") {
			found = append(found, errors.New("mount "+strings.TrimSpace(line)))
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if line, err := os.ReadFile(p); err == nil && strings.Contains(string(line), dir) {
			found = append(found, fmt.Errorf("process %s: %q", p, line))
		}
	}
	return found
}
