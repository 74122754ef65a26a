package kube

import (
	"context"
	"fmt"
)

// FindPod reads one pod, the name of the first of its containers that does not only
// initialize it, and the UID of the node that it is bound to; empty if that is not there.
// It needs the rights that following pods needs. ErrNotFound if there is no such pod.
func FindPod(ctx context.Context, c *Client, namespace, name string) (pod *Pod, container, nodeUID string, err error) {
	var pods Page[podObject]
	path := Path{Resource: Resource{Version: "v1", Plural: "pods"}, Namespace: namespace}
	if err := c.List(ctx, path, Selection{Fields: "metadata.name=" + name}, &pods); err != nil {
		return nil, "", "", err
	}
	if len(pods.Items) == 0 {
		return nil, "", "", fmt.Errorf("%w: pod %s in namespace %s", ErrNotFound, name, namespace)
	}
	object := &pods.Items[0]
	if len(object.Spec.Containers) > 0 {
		container = object.Spec.Containers[0].Name
	}
	var nodes Page[Object]
	err = c.List(ctx, Path{Resource: Resource{Version: "v1", Plural: "nodes"}}, Selection{Fields: "metadata.name=" + object.Spec.NodeName}, &nodes)
	if len(nodes.Items) > 0 {
		nodeUID = nodes.Items[0].Metadata.UID
	}
	return newPod(object), container, nodeUID, err
}
