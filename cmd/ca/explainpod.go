package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/placement"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// podFlags name a pod to explain, and how its cluster is reached.
type podFlags struct {
	pod, container, cluster, config, kubeconfig string
}

func (f *podFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.pod, "pod", "", "pod in Kubernetes, as NAMESPACE/NAME, by the word of the API server")
	cmd.Flags().StringVar(&f.container, "container", "", "container of the pod; its first one by default")
	cmd.Flags().StringVar(&f.cluster, "cluster", "", "cluster of the pod, by its name in the configuration; needed if there are several")
	cmd.Flags().StringVar(&f.config, "config", defaultConfigPath, "configuration file of the CA, which says how clusters are reached; for --pod")
	cmd.Flags().StringVar(&f.kubeconfig, "kubeconfig", "", "kubeconfig file to reach the cluster by, in place of what the configuration says")
}

// find returns what the cluster says of the pod, and the name of the node that it runs
// on, as `ca node list` has it.
func (f *podFlags) find(ctx context.Context) (w *attributesv1.Workload, node string, err error) {
	namespace, name, ok := strings.Cut(f.pod, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return nil, "", fmt.Errorf("--pod: %q is no pod; write NAMESPACE/NAME, such as shop/web-0", f.pod)
	}
	client, err := f.open()
	if err != nil {
		return nil, "", err
	}
	pod, first, nodeUID, err := kube.FindPod(ctx, client, namespace, name)
	switch {
	case errors.Is(err, kube.ErrNotFound):
		return nil, "", fmt.Errorf("cluster %s has no pod %s; see: kubectl get pods -n %s", client.Name(), f.pod, namespace)
	case err != nil:
		return nil, "", err
	case pod.Node() == "":
		return nil, "", fmt.Errorf("pod %s is on no node yet; see: kubectl describe pod -n %s %s", f.pod, namespace, name)
	case nodeUID == "":
		return nil, "", fmt.Errorf("node %s of pod %s is not there any more", pod.Node(), f.pod)
	}
	k := placement.Facts(pod)
	if pod.StaticUID != "" {
		k.PodUid = pod.StaticUID
	}
	if f.container != "" {
		first = f.container
	}
	c, ok := pod.Container(first)
	if !ok {
		return nil, "", fmt.Errorf("--container: pod %s has no container %q", f.pod, first)
	}
	k.Container, k.ContainerId, k.Image, k.ImageDigest = first, c.ID, c.Image(), c.ImageDigest()
	return &attributesv1.Workload{K8S: k}, client.Name() + "." + nodeUID, nil
}

// open returns a client of the pod's cluster.
func (f *podFlags) open() (*kube.Client, error) {
	v, err := loadSettings(f.config, true, overrides{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, c := range v.Kubernetes.Clusters {
		names = append(names, c.Name)
	}
	at := slices.Index(names, f.cluster)
	switch {
	case len(names) == 0:
		return nil, fmt.Errorf("--pod: %s names no cluster: write kubernetes.clusters (see docs/kubernetes.md)", f.config)
	case f.cluster == "" && len(names) == 1:
		at = 0
	case at < 0:
		return nil, fmt.Errorf("--cluster: %q is none of the clusters in %s; write one of %s", f.cluster, f.config, strings.Join(names, ", "))
	}
	settings := v.Kubernetes.Clusters[at]
	if f.kubeconfig != "" {
		settings.Kubeconfig, settings.Context = f.kubeconfig, ""
	}
	return openCluster(settings, nil, slog.New(slog.DiscardHandler))
}
