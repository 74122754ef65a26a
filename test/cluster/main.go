// Command kubernetes is every program of a Kubernetes cluster, and etcd, in one
// binary: the name it is called by, or its first argument, says which. Tests start
// real clusters with it (test/kube); scripts/install-kubernetes builds it.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	etcd "go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // the metrics that the real programs have
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

var programs = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllers.NewControllerManagerCommand,
	"kube-proxy":              proxy.NewProxyCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kubectl":                 func() *cobra.Command { return kubectl.NewDefaultKubectlCommand() },
	"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
}

func main() {
	args := slices.Clone(os.Args)
	args[0] = filepath.Base(args[0])
	if args[0] != "etcd" && programs[args[0]] == nil && len(args) > 1 {
		args = args[1:]
	}
	os.Args = args // cobra and etcd read their arguments there
	if args[0] == "etcd" {
		etcd.Main(args)
		return
	}
	program := programs[args[0]]
	if program == nil {
		fmt.Fprintln(os.Stderr, "usage: kubernetes {etcd | kube-apiserver | kube-controller-manager | kube-proxy | kube-scheduler | kubectl | kubelet} [flags]")
		os.Exit(2)
	}
	os.Exit(cli.Run(program()))
}
